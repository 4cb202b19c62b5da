"""SmoothQuant: move the unevenness of the inputs into the weights, before both are rounded.

Xiao et al. 2023 (arXiv 2211.10438, equation 4): the stages after it see ``W diag(s)`` and inputs
``x / s`` with ``s_j = max|x_j|^alpha / max_i|W_ij|^(1 - alpha)``. A token's scale is that of its
loudest input, so it pays where `int_inputs` ends the scheme: by itself it only makes the weight
harder to round.

The largest value of an input is not among the statistics. In its place stands the root of its mean
square: of n values of one shape the largest is expected to be a multiple of that which
depends on n and the shape alone, and a factor that all inputs share changes no scale once they are
normalised (largest times smallest is 1). `int_inputs` estimates ranges likewise. An input that is
loud on few tokens only is smoothed too little; tokens count in the mean square as the statistics
weigh them, so an attention sink that no gradient reaches does not decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.methods.base import METHODS, Needs
from autocompress.methods.problem import LayerProblem
from autocompress.methods.scaling import SCALES, InputScaling, balanced

_QUIETEST = 1e-3  # of inputs and of columns, relative to the loudest, so that scales fit float16


@dataclass(frozen=True, slots=True)
class SmoothQuantOptions:
    """Options of the smoothing.

    Attributes:
        alpha: how much of the unevenness moves, 0 to 1; at 1 all inputs become equally loud.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SchemeError(
                f"alpha must be 0 to 1, but got {self.alpha}. "
                f"The nearest legal value is {float(min(max(self.alpha, 0), 1))}."
            )


class SmoothQuant(InputScaling[SmoothQuantOptions]):
    """Balance what inputs and columns of weights reach."""

    needs = Needs.DIAGONAL
    options = SmoothQuantOptions
    summary = "balance loud inputs against columns of weights, for schemes that round both"

    def fit(
        self,
        problem: LayerProblem,
        options: SmoothQuantOptions,
        compressed: Callable[[LayerProblem], Tensor],  # noqa: ARG002
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """See `Transform.fit`; without statistics nothing is scaled, with a note."""
        if problem.hessian is None:
            note = "smoothquant scaled nothing: the layer has no calibration statistics"
            return {SCALES: balanced(problem.importance)}, (note,)
        scales = smoothing_scales(problem.weight, problem.hessian, options.alpha)
        return {SCALES: scales}, ()


def smoothing_scales(weight: Tensor, hessian: Tensor, alpha: float) -> Tensor:
    """The scales as they are stored, (d,) float16, of a weight (o, d) and ``E[x x^T]`` (d, d)."""
    inputs = _audible(hessian.diagonal().clamp(min=0).sqrt())
    return balanced(inputs**alpha / _audible(weight.abs().amax(0)) ** (1 - alpha))


def _audible(sizes: Tensor) -> Tensor:
    """None far below the largest; ones if all are zero."""
    largest = sizes.max()
    return sizes.clamp(min=_QUIETEST * largest) if largest > 0 else torch.ones_like(sizes)


METHODS.add("smoothquant", SmoothQuant())
