"""Is a checkpoint what its manifest says? Names the file, and the tensor, that is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from autocompress.core.errors import CheckpointError
from autocompress.export.manifest import FileRecord, Manifest, file_record
from autocompress.export.plan import PackedPlan
from autocompress.export.tensor_file import (
    TensorEntry,
    read_header,
    tensor_digests,
    weight_files,
)

_REPAIR = "Next step: copy the checkpoint again, or export it again."


def check_files(directory: Path, manifest: Manifest) -> None:
    """Hold every file to its checksum, and the weight files to the manifest's tensors.

    Raises:
        CheckpointError: a file or a tensor is missing, truncated, changed or not in the manifest.
    """
    with checking(directory, manifest):
        pass


@contextmanager
def checking(directory: Path, manifest: Manifest) -> Iterator[None]:
    """As `check_files`, around the block that loads the checkpoint.

    Before it: what is there, sizes, and every file but the weights. Their checksums, most of the
    time, are computed beside it; if one is wrong, that is the error, whatever the block ended with.

    Raises:
        CheckpointError: see `check_files`.
    """
    weights = weight_files(directory) if manifest.tensors else ()
    for path in weights:
        if path.name not in manifest.files:
            raise CheckpointError(f"{path} is not in the manifest of the checkpoint. {_REPAIR}")
    for name in manifest.files:
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing. {_REPAIR}")
    _check_tensors(directory, manifest, weights)
    later = []
    for name, record in manifest.files.items():
        path = directory / name
        check = partial(_check_sum, path, record, manifest.tensors if path in weights else {})
        if path in weights and path.stat().st_size == record.bytes:
            later.append(check)
        else:
            check()
    with ThreadPoolExecutor(1) as pool:
        sums = pool.submit(lambda: [check() for check in later])
        try:
            yield
        finally:
            sums.result()


def _check_sum(path: Path, record: FileRecord, digests: Mapping[str, str]) -> None:
    """Refuse a file that is not the one that was written; see `_damage`."""
    if file_record(path) != record:
        raise CheckpointError(_damage(path, record, digests))


def _damage(path: Path, expected: FileRecord, digests: Mapping[str, str]) -> str:
    """What is wrong with a file that is not as it was written.

    Args:
        path: of the file.
        expected: what was written.
        digests: of the tensors of the checkpoint if this is a weight file, else empty.

    Raises:
        CheckpointError: the file is not even complete.
    """
    found = tensor_digests(path) if digests else ()
    wrong = next((name for name, digest in found if digests.get(name) != digest), None)
    if wrong is not None:
        return f"{path} is damaged: tensor {wrong} is not the one that was written. {_REPAIR}"
    size = path.stat().st_size
    return (
        f"{path} is damaged or was edited: its checksum differs ({size} bytes are there, "
        f"{expected.bytes} were written). {_REPAIR}"
    )


def _check_tensors(directory: Path, manifest: Manifest, weights: Sequence[Path]) -> None:
    found = {name for path in weights for name in read_header(path)}
    missing = sorted(manifest.tensors.keys() - found)
    if missing:
        files = ", ".join(path.name for path in weights)
        raise CheckpointError(f"{directory / files}: tensor {missing[0]} is missing. {_REPAIR}")


def require_stored_tensors(plan: PackedPlan, files: Sequence[Path]) -> None:
    """Make sure that the weight files hold what the layers of `plan` store.

    Transformers would fill a missing tensor with whatever is in memory, and only warn.

    Raises:
        CheckpointError: a stored tensor is missing, or of another shape or dtype.
    """
    stray = next((path for path in files if path.suffix != ".safetensors"), None)
    if stray is not None:
        raise CheckpointError(
            f"Packed checkpoints are safetensors files, but got {stray}. {_REPAIR}"
        )
    stored: dict[str, TensorEntry] = {}
    for path in files:
        stored |= read_header(path)
    where = ", ".join(str(path) for path in files)
    for layer in plan.layers:
        for leaf, layout in layer.tensors().items():
            name = f"{layer.name}.{leaf}"
            if name not in stored:
                raise CheckpointError(f"{where}: tensor {name} is missing. {_REPAIR}")
            entry = stored[name]
            if (entry.shape, entry.dtype) != (layout.shape, layout.dtype):
                raise CheckpointError(
                    f"{where}: tensor {name} is {entry.dtype} of shape {entry.shape}, but its "
                    f"scheme {layer.scheme} stores {layout.dtype} of {layout.shape}. {_REPAIR}"
                )
