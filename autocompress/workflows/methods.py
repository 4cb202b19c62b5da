"""The compression methods as rows for a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from autocompress.methods import METHODS


def describe_methods() -> list[dict[str, Any]]:
    """One row per registered method: name, kind, needs, summary and default options."""
    return [
        {
            "name": name,
            "kind": METHODS[name].kind.name.lower(),
            "needs": METHODS[name].needs.name.lower(),
            "summary": METHODS[name].summary,
            "options": dataclasses.asdict(METHODS[name].options()),
        }
        for name in METHODS
    ]
