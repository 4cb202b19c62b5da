"""Write a run's provenance and its HTML report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autocompress.fronts.document import FrontDocument
from autocompress.report.html import write_report as write_page
from autocompress.report.picture import write_picture
from autocompress.report.provenance import collect_provenance
from autocompress.search.journal import JOURNAL_FILE, read_journal

PROVENANCE_FILE = "provenance.json"
PICTURE_FILE = "front.svg"


def write_report(directory: Path) -> Path:
    """Write `report.html`, and `front.svg`, from the run's front, journal and provenance.

    Raises:
        RunDirectoryError: there is no front, the journal is damaged, or the directory cannot be
            written.
    """
    document = FrontDocument.read(directory)
    trials = read_journal(directory / JOURNAL_FILE).results
    write_picture(directory / PICTURE_FILE, document)
    return write_page(directory, document, trials, _read_provenance(directory))


def write_provenance(directory: Path, facts: dict[str, Any]) -> None:
    """Write where and with what the run was made."""
    document = collect_provenance() | facts
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    (directory / PROVENANCE_FILE).write_text(text, encoding="utf-8")


def _read_provenance(directory: Path) -> dict[str, Any]:
    path = directory / PROVENANCE_FILE
    if not path.is_file():
        return {}
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
