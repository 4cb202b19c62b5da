"""GPTQ: quantize one input at a time and let the later ones make up for the error.

Frantar et al. 2023 (arXiv 2210.17323). With ``U^T U = (H + ridge I)^-1``, U upper, inputs in
order: ``e_j = (w_j - q_j) / U_jj`` and ``W_{:,k} -= e_j U_jk`` for k > j. Then
``sum_j e_j^2 = tr(D (H + ridge I) D^T)``. Inputs go by falling diag(H), with the grid fixed
beforehand on the original columns ("static groups"), so that a reload needs no permutation. With
a mask, pruned weights are quantized to zero and made up for as well, as in SparseGPT (Frantar and
Alistarh 2023, arXiv 2301.00774), unless the sparsifier did so already.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.methods.base import METHODS, GridQuantizer, Needs
from autocompress.methods.coding import Quantized
from autocompress.methods.grid import (
    Grid,
    GridCoding,
    GridOptions,
    best_grid,
    round_to_nearest,
)
from autocompress.methods.problem import DAMPING, InverseFactor, LayerProblem

_ROWS_AT_ONCE = 16384  # rows do not meet: those of a vocabulary need not lie there twice at once
_LEAF = 16  # inputs that are updated one by one; above it, updates are matrix products


GPTQOptionsT = TypeVar("GPTQOptionsT", bound="GPTQOptions")


@dataclass(frozen=True, slots=True)
class GPTQOptions(GridOptions):
    """Options of GPTQ, besides the grid's.

    Attributes:
        actorder: quantize loud inputs first.
        damping: share of the mean of diag(H) added to the diagonal, above 0, at most 1.
    """

    actorder: bool = True
    damping: float = DAMPING

    def __post_init__(self) -> None:
        # `super()` without arguments does not work in dataclasses with slots.
        GridOptions.__post_init__(self)
        require_damping(self.damping)


def require_damping(damping: float) -> None:
    """Make sure that it is a share that H may be damped by.

    Raises:
        SchemeError: it is not.
    """
    if not 0 < damping <= 1:
        raise SchemeError(
            f"damping must be above 0 and at most 1, but got {damping}. "
            f"The usual value is {DAMPING}."
        )


class GPTQ(GridQuantizer[GPTQOptions]):
    """Quantization with second-order error compensation."""

    needs = Needs.HESSIAN
    options = GPTQOptions
    summary = "error-compensating quantization (Hessian of the layer's inputs)"
    stronger = "quantease"

    def quantize(
        self, problem: LayerProblem, mask: Tensor | None, options: GPTQOptions
    ) -> Quantized:
        """See `Quantizer.quantize`; rounds to nearest, with a note, where H is of no use."""
        factor, reason = _factor(problem, options)
        if factor is None:
            return round_to_nearest(problem, mask, options, (f"gptq rounded to nearest: {reason}",))
        shown = problem.weight
        if mask is not None:
            shown = compensate_pruned(problem.weight, mask, factor)
        grid = best_grid(shown, problem.importance, options)
        notes: tuple[str, ...] = ()
        if factor.damping > options.damping:
            notes = (f"gptq raised damping to {factor.damping}: H is not positive definite",)
        return grid.quantized(sweep(problem.weight, mask, grid, factor), notes)


class RefinedGPTQ(GridQuantizer[GPTQOptionsT]):
    """A quantizer that starts from the grid and codes of GPTQ.

    Attributes:
        name: of the method, for its notes.
    """

    needs = Needs.HESSIAN
    name: ClassVar[str]

    def quantize(
        self, problem: LayerProblem, mask: Tensor | None, options: GPTQOptionsT
    ) -> Quantized:
        """See `Quantizer.quantize`; rounds to nearest, with a note, where H is of no use."""
        factor, reason = _factor(problem, options)
        if factor is None:
            note = f"{self.name} rounded to nearest: {reason}"
            return round_to_nearest(problem, mask, options, (note,))
        start = GPTQ().quantize(problem, mask, options)
        whole = GridCoding(options).grid(start.parameters)
        found = [
            self.refined(
                problem.with_weight(problem.weight[part]),
                None if mask is None else mask[part],
                options,
                factor,
                (whole.of_rows(part), start.codes[part]),
            )
            for part in row_slices(len(problem.weight))
        ]
        grid = Grid.of_all([grid for grid, _ in found])
        return grid.quantized(torch.cat([codes for _, codes in found]), start.notes)

    @abstractmethod
    def refined(
        self,
        problem: LayerProblem,
        mask: Tensor | None,
        options: GPTQOptionsT,
        factor: InverseFactor,
        start: tuple[Grid, Tensor],
    ) -> tuple[Grid, Tensor]:
        """Grid and codes (o, d) uint8 that lose no more in any row than those to start from.

        Args:
            problem: the weight and its statistics; H is not None.
            mask: (o, d) bool, True where the weight is kept; None keeps all.
            options: of this method.
            factor: the inverse factor that GPTQ used.
            start: grid and codes of GPTQ.
        """


def _factor(problem: LayerProblem, options: GPTQOptions) -> tuple[InverseFactor | None, str]:
    return problem.usable_factor(by_activation=options.actorder, damping=options.damping)


def sweep(weight: Tensor, mask: Tensor | None, grid: Grid, factor: InverseFactor) -> Tensor:
    """Codes (o, d) uint8 of `weight` (o, d) on `grid`, with error compensation."""
    return torch.cat([
        _swept(weight[part], None if mask is None else mask[part], grid.of_rows(part), factor)
        for part in row_slices(len(weight))
    ])  # fmt: skip


def row_slices(n_rows: int) -> list[slice]:
    """Slices of rows that are swept one after another."""
    starts = range(0, n_rows, _ROWS_AT_ONCE)
    return [slice(start, start + _ROWS_AT_ONCE) for start in starts]


def _swept(weight: Tensor, mask: Tensor | None, grid: Grid, factor: InverseFactor) -> Tensor:
    order = factor.order
    groups = (order // grid.options.width(weight.shape[1])).tolist()
    scales = grid.scales.to(weight.dtype).T.contiguous()
    zeros = grid.float_zeros.to(weight.dtype).expand(grid.scales.shape).T.contiguous()
    kept = None if mask is None else mask.T[order].contiguous()
    codes = torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device)

    def settle(j: int, target: Tensor) -> Tensor:
        scale, zero = scales[groups[j]], zeros[groups[j]]
        levels = (target / scale).round_().add_(zero).clamp_(0, grid.options.n_levels - 1)
        if kept is not None:
            levels = torch.where(kept[j], levels, zero)
        codes[j] = levels
        return levels.sub_(zero).mul_(scale)

    Sweep(weight.T[order].contiguous(), factor.upper, settle).run(0, len(order))
    return in_place(codes, order)


def compensate_pruned(weight: Tensor, mask: Tensor, factor: InverseFactor) -> Tensor:
    """The kept weights after they made up for the pruned ones, which are zero.

    What the sweep will have to represent, so the grid is chosen on it.
    """
    kept = mask.T[factor.order].contiguous()
    target = weight.T[factor.order].contiguous()
    values = torch.empty_like(target)

    def settle(j: int, wanted: Tensor) -> Tensor:
        values[j] = wanted * kept[j]
        return values[j]

    Sweep(target, factor.upper, settle).run(0, len(factor.order))
    return in_place(values, factor.order)


def in_place(permuted: Tensor, order: Tensor) -> Tensor:
    """(o, d) in the order of the inputs, from (d, o) in the order of the sweep."""
    straight = torch.empty_like(permuted)
    straight[order] = permuted
    return straight.T.contiguous()


class Sweep:
    """One sweep over `remaining` (d, o): the target minus what earlier errors ask for.

    Input-major, so that what is settled together lies together. Rows that were visited hold
    their scaled error e_j instead. `settle` says what an input becomes.
    """

    def __init__(
        self, remaining: Tensor, upper: Tensor, settle: Callable[[int, Tensor], Tensor]
    ) -> None:
        self.remaining = remaining
        self.upper = upper
        self.settle = settle
        self.pivots: list[float] = upper.diagonal().tolist()

    def run(self, start: int, stop: int) -> None:
        """Settle inputs start..stop-1: halve, and push the first half's errors to the second.

        The same sums as the lazy blocks of the paper, as matrix products at every scale.
        """
        if stop - start > _LEAF:
            middle = (start + stop) // 2
            self.run(start, middle)
            self.push(start, middle, stop)
            self.run(middle, stop)
            return
        for j in range(start, stop):
            target = self.remaining[j]
            target.sub_(self.settle(j, target)).div_(self.pivots[j])
            self.remaining[j + 1 : stop].addr_(self.upper[j, j + 1 : stop], target, alpha=-1)

    def push(self, start: int, middle: int, stop: int) -> None:
        """Make inputs middle..stop-1 make up for the errors of start..middle-1."""
        coupling, errors = self.upper[start:middle, middle:stop], self.remaining[start:middle]
        self.remaining[middle:stop].addmm_(coupling.T, errors, alpha=-1)


METHODS.add("gptq", GPTQ())
