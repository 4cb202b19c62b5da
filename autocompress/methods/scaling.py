"""Transforms that scale each input by a number of its own: ``W x = (W diag(s)) (x / s)``.

The scales are stored and undone after decoding. Nothing is folded into the operation before the
layer, so any layer can take them: an output projection behind grouped values, or a layer that
nothing foldable precedes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import OptionsT, Transform
from autocompress.methods.coding import Damage, Stored
from autocompress.methods.problem import InverseFactor, LayerProblem, LayerStatistics

SCALES = "scales"
"""Name of the stored scales."""


class InputScaling(Transform[OptionsT]):
    """A transform with ``T = diag(s)``, s (d,) stored in float16."""

    def layout(
        self,
        shape: tuple[int, int],
        options: OptionsT,  # noqa: ARG002
    ) -> dict[str, TensorLayout]:
        """See `Transform.layout`."""
        return {SCALES: TensorLayout((shape[1],), "float16")}

    def apply(
        self,
        problem: LayerProblem,
        stored: Stored,
        options: OptionsT,  # noqa: ARG002
    ) -> LayerProblem:
        """See `Transform.apply`."""
        return scaled(problem, stored[SCALES])

    def damage(
        self,
        stored: Stored,
        shape: tuple[int, int],  # noqa: ARG002
        options: OptionsT,  # noqa: ARG002
    ) -> Damage | None:
        """See `Transform.damage`: nothing is divided by zero."""
        if bool((stored[SCALES] > 0).all()):
            return None
        return Damage(SCALES, "must be positive, but some are not")

    def undo(
        self,
        matrix: Tensor,
        stored: Stored,
        options: OptionsT,  # noqa: ARG002
    ) -> Tensor:
        """See `Transform.undo`."""
        return matrix / stored[SCALES].float()

    def inputs(self, rows: Tensor, stored: Stored, options: OptionsT) -> Tensor:
        """See `Transform.inputs`."""
        return self.undo(rows, stored, options)

    def inputs_back(
        self,
        rows: Tensor,
        stored: Stored,
        options: OptionsT,  # noqa: ARG002
    ) -> Tensor:
        """See `Transform.inputs_back`."""
        return rows * stored[SCALES].float()

    def macs_per_token(
        self,
        shape: tuple[int, int],
        options: OptionsT,  # noqa: ARG002
    ) -> int:
        """See `Transform.macs_per_token`."""
        return shape[1]


def balanced(scales: Tensor) -> Tensor:
    """Scales (d,) as they are stored, float16: the smallest is the inverse of the largest."""
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

    def inverse_factor(
        self, *, by_activation: bool, damping: float, piece: int = 1
    ) -> InverseFactor | None:
        factor = self._source.inverse_factor(
            by_activation=by_activation, damping=damping, piece=piece
        )
        if factor is None:
            return None
        upper = factor.upper * self._scales[factor.order]
        return InverseFactor(upper, factor.order, factor.ridge, factor.damping)
