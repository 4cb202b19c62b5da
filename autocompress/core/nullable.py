"""Numbers in JSON documents: what is not finite is null there, and null is read as NaN."""

from __future__ import annotations

import math


def or_null(value: float) -> float | None:
    """The number, or None if it is not finite."""
    return value if math.isfinite(value) else None


def or_nan(value: float | None) -> float:
    """The inverse of `or_null`, but for infinities."""
    return math.nan if value is None else float(value)
