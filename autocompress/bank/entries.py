"""One compressed layer as a file: safetensors with a checksum, written by atomic rename."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autocompress.core import Scheme
from autocompress.core.digest import canonical_json
from autocompress.methods import CompressedWeight

_log = logging.getLogger(__name__)

FORMAT_VERSION = "1"
_META_KEY = "autocompress"


class DamagedEntryError(ValueError):
    """A file of the bank is not what was written."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of the elements in row-major order; no copy if contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array.data


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """128-bit BLAKE2b over names, dtypes, shapes and bytes, in the order of the names."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        state.update(raw_bytes(tensor))
    return state.hexdigest()


def write_entry(path: Path, entry: CompressedWeight) -> None:
    """Write an entry so that a reader sees all of it or nothing.

    Raises:
        OSError: the directory is read-only, full or gone.
    """
    meta = {
        "version": FORMAT_VERSION,
        "scheme": str(entry.scheme),
        "shape": list(entry.shape),
        "dtype": str(entry.dtype).removeprefix("torch."),
        "notes": list(entry.notes),
        "checksum": checksum(entry.tensors),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(temporary), metadata={_META_KEY: canonical_json(meta)})
        temporary.replace(path)
    except SafetensorError as error:  # safetensors wraps the system's error
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_entry(path: Path, scheme: Scheme, *, verify: bool = True) -> CompressedWeight:
    """Read an entry; its tensors are views of the memory-mapped file.

    Args:
        path: the file.
        scheme: canonical; what the entry must hold.
        verify: compare the checksum, which reads every byte.

    Raises:
        FileNotFoundError: there is no such entry.
        DamagedEntryError: it is truncated, altered or of another scheme.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {})[_META_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        entry = CompressedWeight(
            shape=(int(meta["shape"][0]), int(meta["shape"][1])),
            dtype=_dtype(meta["dtype"]),
            scheme=Scheme.parse(meta["scheme"]),
            tensors=tensors,
            notes=tuple(meta["notes"]),
        )
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DamagedEntryError(f"{type(error).__name__}: {error}") from error
    if entry.scheme != scheme:
        raise DamagedEntryError(f"it holds the scheme {entry.scheme}")
    if verify and checksum(tensors) != meta["checksum"]:
        raise DamagedEntryError("the checksum differs")
    return entry


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise DamagedEntryError(f"{name!r} is no dtype")
    return dtype
