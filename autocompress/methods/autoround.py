"""AutoRound: learn which way each weight is rounded, and how far each group is clipped.

Cheng et al. 2024 (arXiv 2309.05516): codes are ``clip(round(w / s + z + V))`` with an offset V for
every weight; two factors in [0.5, 1] per group, one on a symmetric grid, clip the range that its
levels span. All of them follow the sign of their gradient, by steps that shrink linearly to
zero, and the best iterate is kept: here of each row, since rows do not meet in the loss. Rounding
counts as the identity in gradients.

The loss is the layer's own, ``tr(D H D^T)`` with ``D = Q - W``, so its gradient with respect to Q
is ``2 D H`` and no activation is needed; the paper takes the outputs of a whole block. It starts
from the codes of GPTQ: V is then the smallest offset that gives them, and moves by 0.5 at most.
That start is good already, so the first step is a tenth of the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.methods.base import METHODS
from autocompress.methods.gptq import GPTQOptions, RefinedGPTQ
from autocompress.methods.grid import Grid, GridOptions, least_offsets, storable
from autocompress.methods.levels import grouped, per_weight
from autocompress.methods.problem import InverseFactor, LayerProblem, row_losses

_ROWS_AT_ONCE = 1 << 17  # elements of each of the buffers of a chunk of rows
_FIRST_STEP = 0.1  # the first step is this share of 1 / iterations
_MOST_ITERATIONS = 10_000


@dataclass(frozen=True, slots=True)
class AutoRoundOptions(GPTQOptions):
    """Options of learned rounding, besides those of the GPTQ that it starts from.

    Attributes:
        iterations: steps, 1 to 10,000.
    """

    iterations: int = 200

    def __post_init__(self) -> None:
        GPTQOptions.__post_init__(self)
        if not 1 <= self.iterations <= _MOST_ITERATIONS:
            close = min(max(self.iterations, 1), _MOST_ITERATIONS)
            raise SchemeError(
                f"iterations must be 1 to {_MOST_ITERATIONS}, but got {self.iterations}. "
                f"The nearest legal value is {close}."
            )


class AutoRound(RefinedGPTQ[AutoRoundOptions]):
    """GPTQ, then learned rounding and clipping; no row loses more than by GPTQ."""

    name = "autoround"
    options = AutoRoundOptions
    summary = "GPTQ, then rounding and clipping learned by signed gradients of the layer's loss"

    def refined(
        self,
        problem: LayerProblem,
        mask: Tensor | None,
        options: AutoRoundOptions,
        factor: InverseFactor,  # noqa: ARG002 - the loss is that of H itself
        start: tuple[Grid, Tensor],
    ) -> tuple[Grid, Tensor]:
        """See `RefinedGPTQ.refined`."""
        return learned(problem, mask, *start, options.iterations)


def learned(
    problem: LayerProblem, mask: Tensor | None, grid: Grid, codes: Tensor, iterations: int
) -> tuple[Grid, Tensor]:
    """Grid and codes (o, d) uint8 of the best iterate of each row.

    Args:
        problem: the weight and its statistics; H must not be None.
        mask: (o, d) bool, True where the weight is kept; None keeps all.
        grid: to start from.
        codes: to start from, (o, d) uint8.
        iterations: steps.
    """
    hessian = problem.hessian
    assert hessian is not None  # by contract
    scales, zeros, codes = grid.scales.clone(), grid.float_zeros, codes.clone()
    zeros = zeros.expand(scales.shape).clone()
    n_rows = max(1, _ROWS_AT_ONCE // codes.shape[1])
    for rows in torch.split(torch.arange(len(codes), device=codes.device), n_rows):
        kept = None if mask is None else mask[rows]
        start = Grid(grid.options, scales[rows], zeros[rows])
        rounding = Rounding(problem.weight[rows], kept, start, codes[rows])
        found = _best_iterate(rounding, hessian, iterations)
        after, before = (
            row_losses(g.dense(c), problem.weight[rows], hessian)
            for g, c in (found, (start, codes[rows]))
        )
        better = after < before
        chosen = rows[better]
        scales[chosen], zeros[chosen] = found[0].scales[better], found[0].float_zeros[better]
        codes[chosen] = found[1][better]
    stored = None if grid.zeros is None else zeros.to(torch.uint8)
    return Grid(grid.options, scales, stored), codes


def _best_iterate(rounding: Rounding, hessian: Tensor, iterations: int) -> tuple[Grid, Tensor]:
    iterate = rounding.iterate()
    scales, zeros, codes = iterate.scales.clone(), iterate.zeros.clone(), iterate.codes.clone()
    least = torch.full_like(scales[:, 0], torch.inf)
    for step in range(iterations + 1):
        error = iterate.values - rounding.weight
        pushed = error @ hessian
        losses = (error * pushed).sum(1)
        better = (losses < least)[:, None]
        least = torch.minimum(least, losses)
        scales = torch.where(better, iterate.scales, scales)
        zeros = torch.where(better, iterate.zeros, zeros)
        codes = torch.where(better, iterate.codes, codes)
        if step < iterations:
            rounding.descend(iterate, pushed, _FIRST_STEP * (1 - step / iterations) / iterations)
            iterate = rounding.iterate()
    return Grid(rounding.options, scales.half(), zeros), codes.to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Iterate:
    """What the parameters stand for.

    Attributes:
        scales: (rows, G), as stored.
        zeros: (rows, G), whole numbers.
        codes: (rows, d), whole numbers.
        inside: (rows, d) bool, True where a small change of the parameters could move the code.
        values: (rows, d), of the codes.
    """

    scales: Tensor
    zeros: Tensor
    codes: Tensor
    inside: Tensor
    values: Tensor


class Rounding:
    """The parameters of some rows, and the grid and codes that they stand for.

    Attributes:
        weight: (rows, d), the target.
        offsets: V, (rows, d), in steps of the grid.
        high: factors on the upper end of the range, (rows, G); on a symmetric grid on both ends.
        low: factors on the lower end, (rows, G).
    """

    def __init__(self, weight: Tensor, kept: Tensor | None, grid: Grid, codes: Tensor) -> None:
        self.options: GridOptions = grid.options
        self.weight, self._kept = weight, kept
        self._scales = grid.scales.to(weight.dtype)
        self._zeros = grid.float_zeros.to(weight.dtype).expand(self._scales.shape)
        self._top = self.options.n_levels - 1
        self._bottom_end = -self._scales * self._zeros
        self._top_end = self._scales * (self._top - self._zeros)
        self.high, self.low = torch.ones_like(self._scales), torch.ones_like(self._scales)
        places = weight / self._wide(self._scales) + self._wide(self._zeros)
        self.offsets = least_offsets(codes, places)
        self._first_offsets = self.offsets

    def iterate(self) -> Iterate:
        """Grid and codes of the current parameters; those given if nothing moved."""
        scales = self._scales * self.high
        if not self.options.symmetric:
            scales = (self._top_end * self.high - self._bottom_end * self.low) / self._top
        scales = storable(scales).to(self.weight.dtype)
        zeros = self._wanted_zeros(scales).round().clamp_(0, self._top)
        wide_scales, wide_zeros = self._wide(scales), self._wide(zeros)
        rounded = (self.weight / wide_scales).add_(wide_zeros).add_(self.offsets).round_()
        codes = rounded.clamp(0, self._top)
        inside = rounded == codes
        if self._kept is not None:
            codes, inside = torch.where(self._kept, codes, wide_zeros), inside & self._kept
        return Iterate(scales, zeros, codes, inside, (codes - wide_zeros) * wide_scales)

    def descend(self, iterate: Iterate, gradient: Tensor, step: float) -> None:
        """Move every parameter by `step` against the sign of its gradient, within its bounds.

        Args:
            iterate: of the current parameters.
            gradient: of the loss with respect to `iterate.values`, or any positive multiple.
            step: how far.
        """
        of_scales, of_zeros = self._grid_gradient(iterate, gradient)
        of_offsets = gradient * self._wide(iterate.scales) * iterate.inside
        moved = self.offsets - step * of_offsets.sign_()
        self.offsets = moved.clamp_(self._first_offsets - 0.5, self._first_offsets + 0.5)
        of_high = of_scales * self._scales
        if not self.options.symmetric:
            # z = -bottom low / s and s = (top high - bottom low) / n
            through = of_scales - of_zeros * self._wanted_zeros(iterate.scales) / iterate.scales
            of_high = through * self._top_end / self._top
            of_low = -through * self._bottom_end / self._top
            of_low -= of_zeros * self._bottom_end / iterate.scales
            self.low = (self.low - step * of_low.sign_()).clamp_(0.5, 1)
        self.high = (self.high - step * of_high.sign_()).clamp_(0.5, 1)

    def _grid_gradient(self, iterate: Iterate, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """With respect to scales and zero points before they are rounded, (rows, G) each."""
        scales, inside = self._wide(iterate.scales), iterate.inside
        levels = iterate.codes - self._wide(iterate.zeros)
        of_scales = self._per_group(gradient * (levels - self.weight / scales * inside))
        clipped = ~inside if self._kept is None else self._kept & ~inside
        of_zeros = -self._per_group(gradient * scales * clipped)
        rounded = self._wanted_zeros(iterate.scales).round()
        return of_scales, of_zeros * ((rounded >= 0) & (rounded <= self._top))

    def _wanted_zeros(self, scales: Tensor) -> Tensor:
        """Zero points before rounding."""
        if self.options.symmetric:
            return self._zeros
        return -self._bottom_end * self.low / scales

    def _wide(self, per_group: Tensor) -> Tensor:
        """(rows, d) from (rows, G)."""
        d = self.weight.shape[1]
        return per_weight(per_group, self.options.width(d), d)

    def _per_group(self, matrix: Tensor) -> Tensor:
        """Sums over groups, (rows, G) from (rows, d)."""
        return grouped(matrix, self.options.width(matrix.shape[1])).sum(-1)


METHODS.add("autoround", AutoRound())
