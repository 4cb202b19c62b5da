"""Cost efficiency and gate checks: what is wanted of a compressed model."""

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

__all__ = [
    "COST_EFFICIENCY_VERSION",
    "DEFAULT_MIN_RETAINED",
    "Candidate",
    "Check",
    "CostEfficiency",
    "Exponents",
    "ProduceCost",
    "cost_efficiency",
    "default_weights",
    "judge",
    "relative_resources",
]
