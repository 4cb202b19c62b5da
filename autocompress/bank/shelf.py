"""The bank's directory: verified on first reading, bounded in bytes, shared by processes."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from autocompress.bank.entries import read_entry, write_entry
from autocompress.bank.locks import exclusive
from autocompress.core import Scheme, digest
from autocompress.methods import CompressedWeight

DEFAULT_CAPACITY_BYTES = 20 << 30

_SHARE_OF_DISK = 0.5  # of what the bank holds and what is free, if no bound is given
_LOCKS = ".locks"
_LOCK_DIGITS = 3  # 4096 lock files at most, however many layers
_EVICTION = "eviction"
_LOW_WATER = 15 / 16  # evict to below the bound, so that not every write has to
_LOOK_AGAIN = 1 / 16  # share of the room left that one process fills before it looks again
_TOUCH_SECONDS = 60.0  # how exact the time of use is, for entries that are read all the time
_ABANDONED_SECONDS = 3600.0  # age of a temporary file whose writer died


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the directory as it was when looked at."""

    path: Path
    n_bytes: int
    used: float


class Shelf:
    """Entries by key, ``<root>/<aa>/<key>.safetensors``; those used longest ago make room.

    The time of use is the file's modification time, set by readings at most once a minute.
    Removing a file that another process has mapped does it no harm: the memory stays until it is
    let go.

    Args:
        root: the directory; made by the first write.
        capacity_bytes: bound on the sum of the files; None for 20 GiB, or for half of the disk
            space that is free or taken by the bank, if that is less.
    """

    def __init__(self, root: Path, capacity_bytes: int | None) -> None:
        self.root = root
        self._given = capacity_bytes
        self._verified: set[str] = set()
        self._touched: dict[str, float] = {}
        self._accounting = threading.Lock()
        self._unseen = 0  # bytes written since the last look at the directory
        self._room = 0.0  # below the bound at that time

    def path(self, key: str) -> Path:
        """The file that holds, or would hold, an entry."""
        return self.root / key[:2] / f"{key}.safetensors"

    def holds(self, key: str) -> bool:
        """True if there is a file; it may turn out to be damaged."""
        return self.path(key).is_file()

    def read(self, key: str, scheme: Scheme) -> CompressedWeight:
        """An entry whose tensors are views of the mapped file.

        The checksum is verified by the first reading in this process.

        Raises:
            FileNotFoundError, DamagedEntryError, OSError: see `read_entry`.
        """
        known = key in self._verified
        entry = read_entry(self.path(key), scheme, verify=not known)
        self._verified.add(key)
        self._touch(key)
        return entry

    def _touch(self, key: str) -> None:
        """Say that an entry is in use, unless this process has just said so."""
        now = time.monotonic()
        if now - self._touched.get(key, -math.inf) >= _TOUCH_SECONDS:
            self._touched[key] = now
            with suppress(OSError):  # a read-only directory
                os.utime(self.path(key))

    def write(self, key: str, entry: CompressedWeight) -> bool:
        """Write an entry and make room for it; False if it alone exceeds the bound.

        Raises:
            OSError: the directory is read-only, full or gone.
        """
        path = self.path(key)
        if sum(t.nbytes for t in entry.tensors.values()) > self.capacity():
            return False
        write_entry(path, entry)
        self._verified.discard(key)
        n_bytes = path.stat().st_size
        if n_bytes > self.capacity():
            path.unlink()
            return False
        with self._accounting:
            self._unseen += n_bytes
            if self._unseen > _LOOK_AGAIN * self._room:
                self._make_room(path)
        return True

    def building(self, name: str, *, wait: bool = True) -> AbstractContextManager[bool]:
        """The lock that whoever builds entries of `name` holds; see `exclusive`."""
        return exclusive(self.root / _LOCKS / digest(name)[:_LOCK_DIGITS], wait=wait)

    def capacity(self) -> int:
        """The bound in bytes."""
        if self._given is None:
            held = sum(file.n_bytes for file in self._files())
            place = next(p for p in (self.root, *self.root.parents) if p.exists())
            free = shutil.disk_usage(place).free
            self._given = min(DEFAULT_CAPACITY_BYTES, int(_SHARE_OF_DISK * (held + free)))
        return self._given

    def _make_room(self, newest: Path) -> None:
        """Look at the directory and remove what was used longest ago, if it exceeds the bound."""
        capacity = self.capacity()
        with exclusive(self.root / _LOCKS / _EVICTION):
            files = sorted(self._files(), key=lambda file: (file.used, str(file.path)))
            held = sum(file.n_bytes for file in files)
            if held > capacity:
                for file in files:
                    if held <= _LOW_WATER * capacity:
                        break
                    if file.path != newest:
                        file.path.unlink(missing_ok=True)
                        held -= file.n_bytes
        self._unseen, self._room = 0, max(0.0, capacity - held)

    def _files(self) -> Iterator[_File]:
        """All entries; temporary files that a dead process left behind are removed."""
        now = time.time()
        for path in self.root.glob("??/*"):
            with suppress(FileNotFoundError):  # another process removed it
                status = path.stat()
                if path.suffix == ".safetensors":
                    yield _File(path, status.st_size, status.st_mtime)
                elif path.suffix == ".tmp" and now - status.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
