"""Layers that were tuned over their block, in the run's cache: one file each, as in the bank."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from autocompress.bank.entries import DamagedEntryError, read_entry, write_entry
from autocompress.core import Scheme, digest
from autocompress.core.errors import RunDirectoryError
from autocompress.methods import CompressedWeight

_log = logging.getLogger(__name__)


class TunedLayers:
    """A folder of packed layers, by name. A damaged file counts as absent, with a warning.

    Args:
        root: the folder; made by the first `put`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read: dict[str, CompressedWeight] = {}

    def holds(self, wanted: Mapping[str, Scheme]) -> bool:
        """True if all these layers are here, under these schemes."""
        return all(self._get(name, scheme) is not None for name, scheme in wanted.items())

    def all(self, wanted: Mapping[str, Scheme]) -> dict[str, CompressedWeight]:
        """These layers; `holds` has said that they are here."""
        found = {name: self._get(name, scheme) for name, scheme in wanted.items()}
        return {name: entry for name, entry in found.items() if entry is not None}

    def put(self, layers: Mapping[str, CompressedWeight]) -> None:
        """Keep layers, by name.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        for name, entry in layers.items():
            try:
                write_entry(self._path(name), entry)
            except OSError as error:
                raise RunDirectoryError(
                    f"Tuned layers cannot be kept in {self._root} ({error.strerror or error}). "
                    "Next step: free some space, or finalize without --block-steps."
                ) from error

    def _get(self, name: str, scheme: Scheme) -> CompressedWeight | None:
        if name not in self._read:
            try:
                self._read[name] = read_entry(self._path(name), scheme)
            except FileNotFoundError:
                return None
            except DamagedEntryError as error:
                _log.warning("The tuned layer %s is damaged and is tuned again: %s.", name, error)
                return None
        return self._read[name]

    def _path(self, name: str) -> Path:
        return self._root / f"{digest(name)}.safetensors"
