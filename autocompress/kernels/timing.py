"""Seconds of one call on a device, weights read from memory and not from a cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch

_REPEATS = 7
_ENOUGH_SECONDS = 0.02
_CACHE_BYTES = {"cpu": 64 << 20, "cuda": 128 << 20}  # beyond the caches of one socket, or GPU

clock = time.perf_counter
"""That of `timed`; a benchmark on a busy machine sets ``time.process_time``."""


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Least time of a few calls, after one that is not counted.

    Between calls a buffer larger than the caches is read: in a model, all other layers run before a
    layer runs again. Ends after 20 ms, or after two calls if they take longer.
    """
    action()
    buffer = _buffer(device)
    seconds: list[float] = []
    end = time.perf_counter() + _ENOUGH_SECONDS
    while len(seconds) < 2 or (len(seconds) < _REPEATS and time.perf_counter() < end):
        buffer.sum()
        seconds.append(timed(action, device))
    return min(seconds)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Time of one call by `clock`, until the device has done it."""
    if device.type != "cuda":
        start = clock()
        action()
        return clock() - start
    torch.cuda.synchronize(device)
    start = clock()
    action()
    torch.cuda.synchronize(device)
    return clock() - start


@lru_cache(maxsize=4)
def _buffer(device: torch.device) -> torch.Tensor:
    return torch.ones(_CACHE_BYTES.get(device.type, 1 << 20) // 4, device=device)
