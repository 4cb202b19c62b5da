"""Metrics as losses: the one place where the direction of an objective is decided."""

from __future__ import annotations

from autocompress.core import Metrics

LOSS_NAMES = ("damage", "storage_bytes")
"""What a search minimises."""


def losses(metrics: Metrics) -> tuple[float, float]:
    """Losses of a measured model in the order of `LOSS_NAMES`; NaN where the measurement is."""
    return metrics.quality.damage.value, float(metrics.storage_bytes)
