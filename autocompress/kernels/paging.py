"""Memory goes back to the system where a kernel holds its own form of stored tensors.

The tensors of a checkpoint are mapped from its file: pages that nobody uses can go and are read
again if someone does (saving, gradients, another kernel). Linux drops them at once if asked to,
by ``madvise(MADV_PAGEOUT)`` (since 5.4); elsewhere, and for tensors that are not mapped from a
file, nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_PAGE_OUT = 21  # linux/mman.h; the mmap module does not name it


def page_out(tensors: Iterable[Tensor]) -> int:
    """Drop the pages of tensors that lie in mapped files; the bytes that the system agreed to.

    Contents stay as they are: a page that was written to since is not dropped but swapped, or kept.
    """
    advise = _madvise()
    if advise is None:
        return 0
    pages = [(start, stop) for start, stop in map(_whole_pages, tensors) if start < stop]
    files, n_bytes = _mapped_files() if pages else [], 0
    for start, stop in pages:
        inside = any(low <= start and stop <= high for low, high in files)
        if inside and advise(start, stop - start, _PAGE_OUT) == 0:
            n_bytes += stop - start
    return n_bytes


def trim_heap() -> None:
    """Return what was freed; glibc keeps what lies below anything still in use."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def _whole_pages(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the pages that hold nothing but the tensor; empty if it is on another device."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return 0, 0
    start, size = tensor.data_ptr(), mmap.PAGESIZE
    return -(-start // size) * size, (start + tensor.nbytes) // size * size


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are mapped from a file."""
    found = []
    for line in _MAPS.read_text("utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            low, high = fields[0].split("-")
            found.append((int(low, 16), int(high, 16)))
    return found


@lru_cache(maxsize=1)
def _madvise() -> Any:
    """The C function, None where there is none or no list of mappings."""
    if not _MAPS.exists():
        return None
    found = getattr(ctypes.CDLL(None), "madvise", None)
    if found is not None:
        found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    """The C function of glibc, None elsewhere."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if found is not None:
        found.argtypes = (ctypes.c_size_t,)
    return found
