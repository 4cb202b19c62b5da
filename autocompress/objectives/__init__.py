"""Losses, cost efficiency and gate checks: what is wanted of a compressed model."""

from autocompress.objectives.cost_efficiency import (
    COST_EFFICIENCY_VERSION,
    DEFAULT_MIN_RETAINED,
    CostEfficiency,
    Exponents,
    ProduceCost,
    cost_efficiency,
    default_weights,
    relative_resources,
)
from autocompress.objectives.gate import Candidate, Check, judge
from autocompress.objectives.losses import LOSS_NAMES, losses

__all__ = [
    "COST_EFFICIENCY_VERSION",
    "DEFAULT_MIN_RETAINED",
    "LOSS_NAMES",
    "Candidate",
    "Check",
    "CostEfficiency",
    "Exponents",
    "ProduceCost",
    "cost_efficiency",
    "default_weights",
    "judge",
    "losses",
    "relative_resources",
]
