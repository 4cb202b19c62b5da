"""Activation-aware scaling: inputs that are loud get finer steps.

AWQ (Lin et al. 2024, arXiv 2306.00978, section 3.2): the stages after it see ``W diag(s)`` and
inputs ``x / s`` with ``s_j = a_j^alpha``, normalised so that the smallest and the largest s are
each other's inverse; a_j is the size of input j, here the root of its damped mean square. Alpha
minimises the calibration loss of what those stages make of the layer.

The loss over alpha is smooth and has one valley, so it is not tried at every candidate: walking
down by coarse steps that are then halved takes at most 9 of 20 while alpha is 0.4 or less, where
it mostly is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.methods.base import METHODS, Needs
from autocompress.methods.problem import LayerProblem
from autocompress.methods.scaling import SCALES, InputScaling, balanced, scaled

_FIRST_STRIDE = 0.2  # of alpha


@dataclass(frozen=True, slots=True)
class AWQOptions:
    """Options of the scaling.

    Attributes:
        search: candidates ``0, 1/search, 2/search, ..`` for alpha, at least 2.
    """

    search: int = 20

    def __post_init__(self) -> None:
        if self.search < 2:
            raise SchemeError(
                f"search must be at least 2, but got {self.search}. The nearest legal value is 2."
            )


class AWQ(InputScaling[AWQOptions]):
    """Quantize in units in which loud inputs are less loud."""

    needs = Needs.HESSIAN
    options = AWQOptions
    summary = "scale the inputs by a searched power of their size, so that loud ones lose less"

    def fit(
        self,
        problem: LayerProblem,
        options: AWQOptions,
        compressed: Callable[[LayerProblem], Tensor],
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """See `Transform.fit`; never worse than no scaling, which is the first candidate."""
        if problem.hessian is None:
            note = "awq scaled nothing: the layer has no calibration statistics"
            return {SCALES: scales_of(problem, 0.0)}, (note,)

        @cache
        def loss(step: int) -> float:
            moved = scaled(problem, scales_of(problem, step / options.search))
            return moved.loss(compressed(moved))

        stride = max(1, round(_FIRST_STRIDE * options.search))
        return {
            SCALES: scales_of(problem, lowest(loss, options.search, stride) / options.search)
        }, ()


def scales_of(problem: LayerProblem, alpha: float) -> Tensor:
    """The scales as they are stored, (d,) float16; ones for alpha 0."""
    return balanced(problem.importance.sqrt() ** alpha)


def lowest(loss: Callable[[int], float], n: int, stride: int) -> int:
    """Where in ``0 .. n-1`` `loss` is lowest, if it has one valley; never above ``loss(0)``.

    Walks from 0 by `stride` while that helps, then by ever smaller strides around the best.
    """
    best = 0
    while stride:
        for step in (stride, -stride):
            while 0 <= best + step < n and loss(best + step) < loss(best):
                best += step
        stride //= 2
    return best


METHODS.add("awq", AWQ())
