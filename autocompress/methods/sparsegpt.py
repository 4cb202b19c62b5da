"""SparseGPT: prune one input at a time and let the later ones make up for the error.

Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1. The sweep is that of GPTQ, inputs in
their natural order, with ``U^T U = (H + ridge I)^-1``: ``e_j = (w_j - v_j) / U_jj`` and
``W_{:,k} -= e_j U_jk`` for k > j, where v_j is w_j or zero. What is pruned is chosen block by
block, when the sweep gets there, on the weights as updated by then: those of least
``w^2 / U_jj^2`` among the 128 inputs of a block over all rows, or among the M of a pattern N:M.

Before ``gptq`` this stands for the joint sweep of the paper: gptq takes the compensated weights
for its target and keeps the mask in its own error feedback. Unlike there, the mask is chosen
before anything is rounded; in return gptq is free to take the inputs in another order. In the
same order, it makes no difference whether gptq starts from the compensated or from the dense
weights; by falling diag(H), pruned weights of quiet inputs, which come last, would find nothing
left to make up for them if it started from the dense ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.methods.base import METHODS, Needs
from autocompress.methods.gptq import Sweep
from autocompress.methods.problem import DAMPING, InverseFactor, LayerProblem
from autocompress.methods.sparsity import (
    Pruned,
    PruningOptions,
    PruningSparsifier,
    keep_highest,
    keep_pattern,
    n_kept_of,
)

_BLOCK = 128


class SparseGPT(PruningSparsifier):
    """Prunes with second-order error compensation."""

    needs = Needs.HESSIAN
    summary = "error-compensating pruning (Hessian of the layer's inputs)"

    def n_kept(self, shape: tuple[int, int], options: PruningOptions) -> int:
        """See `Sparsifier.n_kept`; counted block by block."""
        o, d = shape
        if options.kept_of is not None:
            kept, width = options.kept_of
            return o * d * kept // width
        starts = range(0, d, _BLOCK)
        return sum(n_kept_of(o * min(_BLOCK, d - start), options.sparsity) for start in starts)

    def choose(self, problem: LayerProblem, options: PruningOptions) -> Pruned:
        """See `PruningSparsifier.choose`.

        Where H is of no use: without compensation, by ``w^2 H_jj``, with a note.
        """
        factor, reason = problem.usable_factor(by_activation=False, damping=DAMPING)
        if factor is None:
            scores = problem.weight.square() * problem.importance
            blocks = torch.split(scores, _width(options), dim=1)
            mask = torch.cat([_kept(block, options) for block in blocks], dim=1)
            note = f"sparsegpt compared |weight| x |input| and changed no weight: {reason}"
            return Pruned(mask, None, (note,))
        notes: tuple[str, ...] = ()
        if factor.damping > DAMPING:
            notes = (f"sparsegpt raised damping to {factor.damping}: H is not positive definite",)
        mask, values = _Pruning(problem.weight, factor, options).run()
        return Pruned(mask, values, notes)


class _Pruning:
    """A sweep (see `Sweep`) that chooses the mask of a block when it comes to it."""

    def __init__(self, weight: Tensor, factor: InverseFactor, options: PruningOptions) -> None:
        self._options, self._block = options, _width(options)
        self._kept = torch.empty(weight.T.shape, dtype=torch.bool, device=weight.device)
        self._values = torch.empty_like(weight.T, memory_format=torch.contiguous_format)
        self._cost = factor.upper.diagonal().square()[:, None]  # of a unit error, inverted
        self._sweep = Sweep(weight.T.contiguous(), factor.upper, self._settle)

    def run(self) -> tuple[Tensor, Tensor]:
        """Mask and values, (o, d)."""
        self._visit(0, len(self._kept))
        return self._kept.T.contiguous(), self._values.T.contiguous()

    def _visit(self, start: int, stop: int) -> None:
        """Prune inputs start..stop-1, whole blocks: halve, and push errors to the second half."""
        n_blocks = -(-(stop - start) // self._block)
        if n_blocks > 1:
            middle = start + n_blocks // 2 * self._block
            self._visit(start, middle)
            self._sweep.push(start, middle, stop)
            self._visit(middle, stop)
            return
        inputs = slice(start, stop)
        scores = self._sweep.remaining[inputs].square() / self._cost[inputs]
        self._kept[inputs] = _kept(scores.T, self._options).T
        self._sweep.run(start, stop)

    def _settle(self, j: int, target: Tensor) -> Tensor:
        self._values[j] = target * self._kept[j]
        return self._values[j]


def _width(options: PruningOptions) -> int:
    """Inputs of which the mask is chosen together."""
    return _BLOCK if options.kept_of is None else options.kept_of[1]


def _kept(scores: Tensor, options: PruningOptions) -> Tensor:
    """The mask of a block (o, width)."""
    if options.kept_of is not None:
        return keep_pattern(scores, options.kept_of)
    n_kept = n_kept_of(scores.numel(), options.sparsity)
    return keep_highest(scores.reshape(1, -1), n_kept).view(scores.shape)


METHODS.add("sparsegpt", SparseGPT())
