"""Activation-aware scaling: inputs that are loud get finer steps.

AWQ (Lin et al. 2024, arXiv 2306.00978, section 3.2): the stages after it see ``W diag(s)`` and
inputs ``x / s`` with ``s_j = a_j^alpha``, normalised so that the smallest and the largest s are
each other's inverse; a_j is the size of input j, here the root of its damped mean square. Alpha
minimises the calibration loss of what those stages make of the layer. The scales are stored and
undone after decoding. Nothing is folded into the operation before the layer, so any layer can take
it: an output projection behind grouped values, or a layer that nothing foldable precedes.

The loss over alpha is smooth and has one valley, so it is not tried at every candidate: walking
down by coarse steps that are then halved takes at most 9 of 20 while alpha is 0.4 or less, where
it mostly is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Transform
from autocompress.methods.coding import Stored
from autocompress.methods.problem import InverseFactor, LayerProblem, LayerStatistics

_SCALES = "scales"
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


class AWQ(Transform[AWQOptions]):
    """Quantize in units in which loud inputs are less loud."""

    needs = Needs.HESSIAN
    options = AWQOptions
    summary = "scale the inputs by a searched power of their size, so that loud ones lose less"

    def layout(
        self,
        shape: tuple[int, int],
        options: AWQOptions,  # noqa: ARG002
    ) -> dict[str, TensorLayout]:
        """See `Transform.layout`."""
        return {_SCALES: TensorLayout((shape[1],), "float16")}

    def fit(
        self,
        problem: LayerProblem,
        options: AWQOptions,
        compressed: Callable[[LayerProblem], Tensor],
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """See `Transform.fit`; never worse than no scaling, which is the first candidate."""
        if problem.hessian is None:
            note = "awq scaled nothing: the layer has no calibration statistics"
            return {_SCALES: scales_of(problem, 0.0)}, (note,)

        @cache
        def loss(step: int) -> float:
            moved = scaled(problem, scales_of(problem, step / options.search))
            return moved.loss(compressed(moved))

        stride = max(1, round(_FIRST_STRIDE * options.search))
        return {
            _SCALES: scales_of(problem, lowest(loss, options.search, stride) / options.search)
        }, ()

    def apply(
        self,
        problem: LayerProblem,
        stored: Stored,
        options: AWQOptions,  # noqa: ARG002
    ) -> LayerProblem:
        """See `Transform.apply`."""
        return scaled(problem, stored[_SCALES])

    def undo(
        self,
        matrix: Tensor,
        stored: Stored,
        options: AWQOptions,  # noqa: ARG002
    ) -> Tensor:
        """See `Transform.undo`."""
        return matrix / stored[_SCALES].float()

    def inputs(self, rows: Tensor, stored: Stored, options: AWQOptions) -> Tensor:
        """See `Transform.inputs`."""
        return self.undo(rows, stored, options)

    def inputs_back(
        self,
        rows: Tensor,
        stored: Stored,
        options: AWQOptions,  # noqa: ARG002
    ) -> Tensor:
        """See `Transform.inputs_back`."""
        return rows * stored[_SCALES].float()

    def macs_per_token(
        self,
        shape: tuple[int, int],
        options: AWQOptions,  # noqa: ARG002
    ) -> int:
        """See `Transform.macs_per_token`."""
        return shape[1]


def scales_of(problem: LayerProblem, alpha: float) -> Tensor:
    """The scales as they are stored, (d,) float16; ones for alpha 0."""
    scales = problem.importance.sqrt() ** alpha
    return (scales / (scales.min() * scales.max()).sqrt()).to(torch.float16)


def scaled(problem: LayerProblem, scales: Tensor) -> LayerProblem:
    """The problem for inputs ``x / s``, s (d,) float16; itself if every scale is 1."""
    scales = scales.float()
    if bool((scales == 1).all()):
        return problem
    statistics = problem.statistics
    if problem.hessian is not None:
        hessian = problem.hessian / torch.outer(scales, scales)
        statistics = LayerStatistics(hessian, problem.n_tokens, f"{statistics.digest}.scaled")
    return _Scaled(problem.weight * scales, statistics, problem, scales)


class _Scaled(LayerProblem):
    """A problem for scaled inputs; takes its inverse factors from the problem it was made from.

    ``U diag(s)`` is the factor of ``diag(1/s) (H + ridge I) diag(1/s)``: one decomposition, damped
    as for the inputs as they are, serves every candidate.
    """

    def __init__(
        self, weight: Tensor, statistics: LayerStatistics, source: LayerProblem, scales: Tensor
    ) -> None:
        super().__init__(weight, statistics)
        self._source, self._scales = source, scales

    def with_weight(self, weight: Tensor) -> LayerProblem:
        return _Scaled(weight, self.statistics, self._source, self._scales)

    def inverse_factor(self, *, by_activation: bool, damping: float) -> InverseFactor | None:
        factor = self._source.inverse_factor(by_activation=by_activation, damping=damping)
        if factor is None:
            return None
        upper = factor.upper * self._scales[factor.order]
        return InverseFactor(upper, factor.order, factor.ridge, factor.damping)


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
