"""A least-recently-used cache that is bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteLru(Generic[K, V]):
    """Keeps the values that were used last, up to a number of bytes; threads may share it.

    Args:
        capacity_bytes: sum of sizes that is kept; a single value above it is not kept at all.
        size: bytes of a value.
    """

    def __init__(self, capacity_bytes: int, size: Callable[[V], int]) -> None:
        self.capacity_bytes = capacity_bytes
        self._size = size
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def n_bytes(self) -> int:
        """Bytes that are kept now."""
        return self._n_bytes

    def get(self, key: K) -> V | None:
        """The value, which becomes the one used last; None if it is not kept."""
        with self._lock:
            entry = self._values.get(key)
            if entry is None:
                return None
            self._values.move_to_end(key)
            return entry[0]

    def put(self, key: K, value: V) -> None:
        """Keep a value, dropping those used longest ago to make room."""
        n_bytes = self._size(value)
        with self._lock:
            self._n_bytes -= self._values.pop(key, (value, 0))[1]
            if n_bytes > self.capacity_bytes:
                return
            self._values[key] = (value, n_bytes)
            self._n_bytes += n_bytes
            while self._n_bytes > self.capacity_bytes:
                _, (_, dropped) = self._values.popitem(last=False)
                self._n_bytes -= dropped

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._values.clear()
            self._n_bytes = 0
