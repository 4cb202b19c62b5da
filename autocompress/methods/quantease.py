"""QuantEase: go over the codes again and again, each time to the best one given all others.

Behdin et al. 2023 (arXiv 2309.01885): with all other codes given, the loss ``tr(D H D^T)``,
``D = Q - W``, is a parabola in ``q_j``, least at ``q_j - (D H)_j / H_jj``, so its nearest level is
optimal; no move loses. It starts from the codes of GPTQ, with the same damped H and order of the
inputs. Between two sweeps and the next two, the scales of a row are fitted to its codes all at
once: ``Q_j = s_g(j) l_j`` is linear in them, so they solve a G x G system.

What is kept of a row is the state that loses least by H itself, GPTQ's own among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.methods.base import METHODS
from autocompress.methods.gptq import GPTQOptions, RefinedGPTQ
from autocompress.methods.grid import Grid, storable
from autocompress.methods.levels import grouped, per_weight
from autocompress.methods.problem import InverseFactor, LayerProblem, row_losses

_ELEMENTS_AT_ONCE = 1 << 22  # of each of the buffers of a chunk of rows
_BLOCK = 32  # inputs that are updated one by one; what they did to the others is a matrix product
_SWEEPS = 2  # between two fits of the scales
_MOST_ROUNDS = 100
_PULL = 1e-4  # of a fit towards the scales that there are, relative to its mean diagonal


@dataclass(frozen=True, slots=True)
class QuantEaseOptions(GPTQOptions):
    """Options of the descent, besides those of the GPTQ that it starts from.

    Attributes:
        rounds: times that scales are fitted and codes are gone over twice, 1 to 100.
    """

    rounds: int = 4

    def __post_init__(self) -> None:
        GPTQOptions.__post_init__(self)
        if not 1 <= self.rounds <= _MOST_ROUNDS:
            close = min(max(self.rounds, 1), _MOST_ROUNDS)
            raise SchemeError(
                f"rounds must be 1 to {_MOST_ROUNDS}, but got {self.rounds}. "
                f"The nearest legal value is {close}."
            )


class QuantEase(RefinedGPTQ[QuantEaseOptions]):
    """GPTQ, then coordinate descent; no row loses more than by GPTQ."""

    name = "quantease"
    options = QuantEaseOptions
    summary = "GPTQ, then coordinate descent over codes and least-squares scales"

    def refined(
        self,
        problem: LayerProblem,
        mask: Tensor | None,
        options: QuantEaseOptions,
        factor: InverseFactor,
        start: tuple[Grid, Tensor],
    ) -> tuple[Grid, Tensor]:
        """See `RefinedGPTQ.refined`."""
        assert problem.hessian is not None  # by contract
        damped = problem.hessian.clone()
        damped.diagonal().add_(factor.ridge)
        return Descent(problem, mask, damped, factor.order).run(*start, options.rounds)


class Descent:
    """Coordinate descent on one layer.

    Args:
        problem: the weight and its statistics; H must not be None.
        mask: (o, d) bool, True where the weight is kept; None keeps all.
        damped: (d, d), positive definite: what descends.
        order: of the inputs, (d,) int64.
    """

    def __init__(
        self, problem: LayerProblem, mask: Tensor | None, damped: Tensor, order: Tensor
    ) -> None:
        self._problem, self._mask, self._damped, self._order = problem, mask, damped, order
        self._permuted = damped[order][:, order].contiguous()

    def run(self, grid: Grid, codes: Tensor, rounds: int) -> tuple[Grid, Tensor]:
        """Grid and codes (o, d) uint8 of the best state of each row, from given ones."""
        best, least = (grid, codes), self._losses(grid, codes)
        for _ in range(rounds):
            grid = self.fitted(grid, codes)
            for _ in range(_SWEEPS):
                codes = self.swept(grid, codes)
            losses = self._losses(grid, codes)
            better = (losses < least)[:, None]
            least = torch.minimum(losses, least)
            scales = torch.where(better, grid.scales, best[0].scales)
            best = (
                Grid(grid.options, scales, grid.zeros),
                torch.where(better, codes, best[1]),
            )
        return best

    def swept(self, grid: Grid, codes: Tensor) -> Tensor:
        """Codes (o, d) uint8 after each was moved once to the best one given the others."""
        order, hessian = self._order, self._permuted
        groups = (order // grid.options.width(codes.shape[1])).tolist()
        scales = grid.scales.float().T.contiguous()
        pushed = (grid.dense(codes) - self._problem.weight) @ self._damped
        pushed = pushed.T[order].contiguous()  # (D H)^T, kept up to date
        moving = codes.T[order].float().contiguous()
        kept = None if self._mask is None else self._mask.T[order].contiguous()
        pivots = hessian.diagonal().tolist()
        for start in range(0, len(order), _BLOCK):
            stop = min(start + _BLOCK, len(order))
            near, moves = pushed[start:stop].clone(), torch.empty_like(pushed[start:stop])
            for j in range(start, stop):
                scale, k = scales[groups[j]], j - start
                wanted = moving[j] - near[k] / (scale * pivots[j])
                wanted.round_().clamp_(0, grid.options.n_levels - 1)
                if kept is not None:
                    wanted = torch.where(kept[j], wanted, moving[j])
                moves[k] = (wanted - moving[j]).mul_(scale)
                moving[j] = wanted
                near[k + 1 :].addr_(hessian[j, j + 1 : stop], moves[k])
            pushed.addmm_(hessian[:, start:stop], moves)
        straight = torch.empty_like(moving)
        straight[order] = moving
        return straight.T.to(torch.uint8).contiguous()

    def fitted(self, grid: Grid, codes: Tensor) -> Grid:
        """The grid with the scales of each row that lose least with these codes."""
        n_groups = grid.scales.shape[1]
        n_rows = max(1, _ELEMENTS_AT_ONCE // max(codes.shape[1], n_groups * n_groups))
        scales = torch.cat(
            [
                self._fitted_rows(grid, codes, rows)
                for rows in torch.split(torch.arange(len(codes), device=codes.device), n_rows)
            ]
        )
        return Grid(grid.options, scales.to(torch.float16), grid.zeros)

    def _fitted_rows(self, grid: Grid, codes: Tensor, rows: Tensor) -> Tensor:
        """Scales (rows, G) float32, storable."""
        d, width = codes.shape[1], grid.options.width(codes.shape[1])
        scales = grid.scales[rows]
        zeros = grid.float_zeros.expand(grid.scales.shape)[rows]
        levels = codes[rows] - per_weight(zeros, width, d)
        system = torch.stack(
            [
                grouped(levels[:, g : g + width] @ self._damped[g : g + width] * levels, width).sum(
                    -1
                )
                for g in range(0, d, width)
            ],
            dim=1,
        ).double()
        error = self._problem.weight[rows] - Grid(grid.options, scales, zeros).dense(codes[rows])
        missing = grouped((error @ self._damped) * levels, width).sum(-1).double()
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += (_PULL * diagonal.mean(1, keepdim=True)).clamp(min=torch.finfo().tiny)
        change = torch.linalg.solve(system, missing[..., None])[..., 0]
        return storable((scales + change).float())

    def _losses(self, grid: Grid, codes: Tensor) -> Tensor:
        """Of each row, by H itself, (o,) float64."""
        return row_losses(grid.dense(codes), self._problem.weight, self._problem.hessian)


METHODS.add("quantease", QuantEase())
