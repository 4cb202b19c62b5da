"""What commands print: documents on stdout, words for people on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any


def console() -> Any:
    """A terminal for tables."""
    from rich.console import Console

    return Console()


def say(text: str) -> None:
    """One line of progress for people, on stderr."""
    sys.stderr.write(f"{text}\n")


def print_json(document: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
