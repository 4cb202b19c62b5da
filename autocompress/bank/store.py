"""Where packed layers are kept: in the directory, or in memory where it cannot hold them."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path

from autocompress.bank.entries import DamagedEntryError
from autocompress.bank.lru import ByteLru
from autocompress.bank.shelf import Shelf
from autocompress.core import Scheme
from autocompress.methods import CompressedWeight

_log = logging.getLogger(__name__)


class EntryStore:
    """Packed layers by key; what goes wrong with the directory is said once.

    Args:
        root: the directory.
        capacity_bytes: bound on it, see `Shelf`.
        fallback_bytes: memory for entries that it cannot hold.
    """

    def __init__(self, root: Path, capacity_bytes: int | None, fallback_bytes: int) -> None:
        self._shelf = Shelf(root, capacity_bytes)
        self._in_memory: ByteLru[str, CompressedWeight] = ByteLru(fallback_bytes, _packed_bytes)
        self._damaged: set[str] = set()
        self._said: set[str] = set()

    def capacity(self) -> int:
        """Bound on the directory, in bytes."""
        return self._shelf.capacity()

    def path(self, key: str) -> Path:
        """The file that holds, or would hold, an entry."""
        return self._shelf.path(key)

    def building(self, name: str, *, wait: bool = True) -> AbstractContextManager[bool]:
        """The lock that whoever builds entries of `name` holds, see `Shelf.building`."""
        return self._shelf.building(name, wait=wait)

    def holds(self, key: str) -> bool:
        """True if there is an entry; that of a file may turn out to be damaged."""
        return self._shelf.holds(key) or self._in_memory.get(key) is not None

    def find(self, key: str, name: str, scheme: Scheme) -> CompressedWeight | None:
        """The entry of a layer under a scheme; None if there is none that can be read."""
        entry = self._in_memory.get(key)
        if entry is not None:
            return entry
        try:
            return self._shelf.read(key, scheme)
        except FileNotFoundError:
            return None
        except DamagedEntryError as error:
            if key not in self._damaged:
                _log.warning(
                    "The bank entry %s (layer %s, scheme %s) is damaged and is built again: %s.",
                    self._shelf.path(key),
                    name,
                    scheme,
                    error,
                )
            self._damaged.add(key)
        except OSError as error:
            self._say_unusable(error)
        return None

    def keep(self, key: str, name: str, entry: CompressedWeight) -> CompressedWeight:
        """Keep the entry of a layer, and give it back."""
        try:
            kept = self._shelf.write(key, entry)
        except OSError as error:
            kept = False
            self._say_unusable(error)
        else:
            if not kept:
                self._say_once(
                    "too large",
                    f"A packed layer of {_packed_bytes(entry):,} bytes exceeds the bank's bound of "
                    f"{self._shelf.capacity():,} bytes ({name}); such layers are kept in "
                    "memory and built again by every process. Give the bank more room.",
                )
        if kept:
            self._damaged.discard(key)
        else:
            self._in_memory.put(key, entry)
        return entry

    def _say_unusable(self, error: OSError) -> None:
        self._say_once(
            "unusable",
            f"The bank directory {self._shelf.root} cannot be used; compressed layers are kept in "
            f"memory and lost when this process ends: {error}.",
        )

    def _say_once(self, about: str, text: str) -> None:
        """Warn, unless something was said about this before."""
        if about not in self._said:
            _log.warning("%s", text)
        self._said.add(about)


def _packed_bytes(entry: CompressedWeight) -> int:
    return sum(tensor.nbytes for tensor in entry.tensors.values())
