"""What checkpoints of all formats have in common when they are written."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from autocompress.core import Allocation
from autocompress.core.errors import CheckpointError, ModelError
from autocompress.export.companions import copy_companions, copy_processor_files
from autocompress.export.manifest import Manifest, file_record, stored_bytes
from autocompress.export.tensor_file import tensor_digests, weight_files
from autocompress.models import BaseModel
from autocompress.models.weights import sharing_copy

_LIBRARIES = ("autocompress", "torch", "transformers", "safetensors")


def shallow_copy(module: nn.Module) -> PreTrainedModel:
    """A model of its own that shares every tensor with `module`: changing modules leaves no trace.

    Raises:
        ModelError: the module cannot be saved as a checkpoint, or is quantized already.
    """
    if not isinstance(module, PreTrainedModel):
        raise ModelError(
            f"Only transformers models can be exported, but got a {type(module).__name__}."
        )
    if getattr(module.config, "quantization_config", None) is not None:
        raise ModelError(
            "The base model is quantized already, and layers cannot be packed twice. Next step: "
            "search on the original checkpoint."
        )
    return cast(PreTrainedModel, sharing_copy(module))


def finish(
    directory: Path,
    base: BaseModel,
    *,
    allocation: Allocation,
    claim: Mapping[str, Any],
    checkpoint_format: str,
    notes: Mapping[str, tuple[str, ...]],
    foreign_bytes: int | None = None,
) -> Manifest:
    """Add processor, companion files and the manifest to the weights in `directory`.

    Args:
        directory: holds the weights and config.json.
        base: model that was compressed.
        allocation: scheme of every compressed layer.
        claim: what was measured.
        checkpoint_format: name of the exporter.
        notes: by layer, what methods had to say.
        foreign_bytes: bytes of all tensors where the weight files are not safetensors; such files
            are held to their checksums as a whole.
    """
    if base.processor is not None:
        base.processor.save_pretrained(directory)
    copy_processor_files(base.source, directory)
    copy_companions(base.source, directory)
    files = {
        path.relative_to(directory).as_posix(): file_record(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    manifest = Manifest(
        checkpoint_format=checkpoint_format,
        auto_class=base.auto_class,
        base_model=str(claim.get("base_model", base.source)),
        base_digest=base.digest,
        storage_bytes=stored_bytes(directory) if foreign_bytes is None else foreign_bytes,
        file_bytes=sum(record.bytes for record in files.values()),
        claim=claim,
        allocation=allocation.to_json(),
        notes=notes,
        files=files,
        tensors={} if foreign_bytes is not None else _tensor_digests(directory),
        libraries={"python": platform.python_version()} | {n: version(n) for n in _LIBRARIES},
    )
    manifest.write(directory)
    return manifest


def _tensor_digests(directory: Path) -> dict[str, str]:
    return dict(chain.from_iterable(map(tensor_digests, weight_files(directory))))


def parameter_bytes(module: nn.Module) -> int:
    """Of all parameters of a module, each tied one once."""
    return sum(parameter.nbytes for parameter in module.parameters())


def require_bytes(found: int, expected: int, what: str) -> None:
    """Refuse to publish a file that does not weigh what was claimed for it.

    Raises:
        CheckpointError: the two numbers differ.
    """
    if found != expected:
        raise CheckpointError(
            f"The tensors of the export weigh {found:,} bytes, but {what} {expected:,}. Nothing "
            "was written. Next step: search again, so that costs and layers are of one version."
        )
