"""What a search predicted: its space and option table, kept in the run directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from autocompress.core import DEFAULT_OBJECTIVES, Objectives
from autocompress.core.errors import RunDirectoryError
from autocompress.core.files import write_atomically
from autocompress.search.option_table import OptionTable
from autocompress.spaces import SearchSpace

PREDICTIONS = "predictions.json"


@dataclass(frozen=True, slots=True)
class Predictions:
    """A search space on one model, the option table of it, and what the search is about."""

    space: SearchSpace
    table: OptionTable
    objectives: Objectives = DEFAULT_OBJECTIVES

    def write(self, directory: Path) -> None:
        """Write `predictions.json` by atomic rename.

        Raises:
            RunDirectoryError: the directory cannot be written.
        """
        document = {
            "space": self.space.to_json(),
            "table": self.table.to_json(),
            "optimize": self.objectives.text,
        }
        try:
            write_atomically(directory / PREDICTIONS, json.dumps(document))
        except OSError as error:
            raise RunDirectoryError(
                f"The run directory {directory} cannot be written ({error.strerror or error})."
            ) from error

    @classmethod
    def read(cls, directory: Path) -> Predictions:
        """Read `predictions.json`.

        Raises:
            RunDirectoryError: there is none, or it is damaged.
        """
        path = directory / PREDICTIONS
        if not path.is_file():
            raise RunDirectoryError(
                f"To solve for a budget takes {PREDICTIONS}, but {directory} holds none: its "
                "search used a sampler without predictions, or an older version. Next step: search "
                "again with --sampler guided."
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                SearchSpace.from_json(data["space"]),
                OptionTable.from_json(data["table"]),
                Objectives.parse(data.get("optimize", DEFAULT_OBJECTIVES.text)),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RunDirectoryError(
                f"{path} is damaged ({type(error).__name__}: {error}). Next step: resume the "
                "search; it writes the file again."
            ) from error
