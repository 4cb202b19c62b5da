"""Safetensors files read without torch: names, shapes, dtypes and raw bytes.

The layout is public (https://huggingface.co/docs/safetensors): eight bytes with the length of a
JSON header, the header, the data. Reading it here gives errors that name file and tensor, and
lets a gate weigh a checkpoint in milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.core import DTYPE_BYTES, digest_bytes
from autocompress.core.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_REPAIR = "Next step: copy the checkpoint again, or export it again."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        shape: of the tensor.
        dtype: as torch spells it without the prefix.
        start: offset of its first byte in the file.
        n_bytes: its length.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int
    n_bytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in the order of their data.

    Raises:
        CheckpointError: the file is missing, empty, truncated or not of that format; names the
            first tensor that is cut off.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, _LONGEST_HEADER + 1))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. {_REPAIR}") from error
    if size < 8 or length > _LONGEST_HEADER or size < 8 + length:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {size} bytes are there, fewer than its "
            f"header needs. {_REPAIR}"
        )
    return _entries(path, text, 8 + length, size)


def _entries(path: Path, text: bytes, start: int, size: int) -> dict[str, TensorEntry]:
    try:
        header: dict[str, dict[str, Any]] = json.loads(text)
        entries = {
            name: _entry(entry, start) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has a damaged header ({type(error).__name__}: {error}). {_REPAIR}"
        ) from error
    ordered = dict(sorted(entries.items(), key=lambda item: item[1].start))
    end = start
    for name, entry in ordered.items():
        if entry.start != end:
            raise CheckpointError(f"{path} has a gap or an overlap before {name}. {_REPAIR}")
        end += entry.n_bytes
        if end > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends at byte {end}, but the file has {size} "
                f"bytes. {_REPAIR}"
            )
    if end != size:
        raise CheckpointError(f"{path} has {size - end} bytes after its last tensor. {_REPAIR}")
    return ordered


def _entry(data: Mapping[str, Any], start: int) -> TensorEntry:
    first, last = data["data_offsets"]
    shape = tuple(int(n) for n in data["shape"])
    dtype = _DTYPES[data["dtype"]]
    if last - first != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{last - first} bytes for shape {shape} of {dtype}")
    return TensorEntry(shape, dtype, start + first, last - first)


def tensor_digests(path: Path) -> Iterator[tuple[str, str]]:
    """Name and 128-bit digest of the bytes of each tensor in the file; reads one at a time."""
    entries = read_header(path)
    with path.open("rb") as file:
        for name, entry in entries.items():
            file.seek(entry.start)
            yield name, digest_bytes(file.read(entry.n_bytes))


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a model directory: one, or the shards that its index names.

    Raises:
        CheckpointError: there are none, or the index is damaged or leads out of the directory.
    """
    index = directory / INDEX_FILE
    if not index.is_file():
        if (directory / WEIGHTS_FILE).is_file():
            return (directory / WEIGHTS_FILE,)
        raise CheckpointError(
            f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}. Next step: give a "
            "directory that save_pretrained or autocompress wrote."
        )
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged ({error}). {_REPAIR}") from error
    strays = [n for n in names if not isinstance(n, str) or Path(n).name != n]
    if strays or not names:
        raise CheckpointError(f"{index} names files that are not beside it: {strays[:3]}.")
    return tuple(directory / name for name in names)


def stored_bytes(directory: Path) -> int:
    """Bytes of all tensors in the weight files of a model directory, headers not counted.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return sum(
        entry.n_bytes for path in weight_files(directory) for entry in read_header(path).values()
    )
