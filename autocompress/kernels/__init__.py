"""Kernels: how packed layers run fast. See `base` for the contract, `dispatch` for the choice.

Importing this package imports no operator and measures nothing.
"""

from autocompress.kernels import (  # noqa: F401
    corrected,
    dynamic,
    int8_groups,
    integer,
    integer_tiles,
    low_rank,
    native_grid,
    sparse,
    tiles,
)
from autocompress.kernels.base import KERNELS, Kernel, Prepared
from autocompress.kernels.dispatch import (
    AUTO,
    REFERENCE,
    Runner,
    refusals,
    require_choice,
    signature,
)
from autocompress.kernels.measure import measure, times

__all__ = [
    "AUTO",
    "KERNELS",
    "REFERENCE",
    "Kernel",
    "Prepared",
    "Runner",
    "measure",
    "refusals",
    "require_choice",
    "signature",
    "times",
]
