"""How much a search spends where nothing else is said: a first look, or the usual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autocompress.core.errors import UsageError, nearest

STANDARD, QUICK = "standard", "quick"
EFFORTS: Mapping[str, Mapping[str, Any]] = {
    STANDARD: {},
    QUICK: {
        "space": "quick",
        "budget": ("16 trials",),
        "calibration_tokens": 2048,
        "search_tokens": 1024,
        "report_tokens": 1536,
        "finalize": False,
    },
}
"""Settings by effort; those of `SearchSettings` where one says nothing."""


def with_effort(effort: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `SearchSettings`: those given, not None, over those of an effort.

    Raises:
        UsageError: no such effort.
    """
    if effort not in EFFORTS:
        raise UsageError(f"Unknown --effort {effort!r}. {nearest(effort, EFFORTS)}")
    return {**EFFORTS[effort], **{n: value for n, value in given.items() if value is not None}}
