"""Optimal BERT Surgeon in one shot: block-diagonal second-order pruning, rescored on the way.

Kurtic et al. 2022 (arXiv 2203.07259). The Fisher matrix F of the weights is taken to be
block-diagonal, with blocks of B consecutive inputs of a row. To prune weight i costs
``w_i^2 / (2 [F^-1]_ii)``, and the survivors of its block make up for it by
``-w_i / [F^-1]_ii F^-1 e_i``. Weights go in rounds ("recomputations" in the authors' code); after
each of them F^-1 and the costs are those of the survivors.

Where this differs from the paper:

* The paper estimates F from gradients of single samples, which a layer's statistics do not hold.
  Here F is its Kronecker approximation (K-FAC, Martens and Grosse 2015, arXiv 1503.05671): the
  block of row r is ``f_r H_BB``.
* The output's f_r, unknown here, cancels in the updates and in comparisons within a row. So each
  row keeps the same number of weights, where the paper compares those of all layers.
* Weights pruned in one round are taken out one by one, so that survivors are always the
  least-squares refit of their block; the authors' code adds up updates as if each were alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from autocompress.core.errors import SchemeError
from autocompress.methods.base import METHODS, Needs, SparsityOptions
from autocompress.methods.problem import LayerProblem
from autocompress.methods.sparsity import JointSparsifier, Pruned, keep_highest, n_kept_of

_ELEMENTS_AT_ONCE = 1 << 20  # of the inverse blocks of a chunk of rows
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class SurgeonOptions(SparsityOptions):
    """Options of the block-diagonal surgeon.

    Attributes:
        block: inputs of a row whose weights make up for each other, 1 to 256; 1: none do.
        recomputations: rounds in which weights are pruned, 1 to 64; each prunes the same share of
            what the one before it left. Always 1 in blocks of 1.
    """

    block: int = 32
    recomputations: int = 8

    def __post_init__(self) -> None:
        # `super()` without arguments does not work in dataclasses with slots.
        SparsityOptions.__post_init__(self)
        for name, highest in (("block", 256), ("recomputations", 64)):
            value = getattr(self, name)
            if not 1 <= value <= highest:
                raise SchemeError(
                    f"{name} must be 1 to {highest}, but got {value}. "
                    f"The nearest legal value is {min(max(value, 1), highest)}."
                )
        if self.block == 1:  # no updates, so nothing to compute again
            object.__setattr__(self, "recomputations", 1)


class BlockSurgeon(JointSparsifier[SurgeonOptions]):
    """Prunes by the second-order cost within small blocks of a row."""

    needs = Needs.HESSIAN
    options = SurgeonOptions
    summary = "prune in rounds by second-order cost in blocks of inputs (Optimal BERT Surgeon)"

    def n_kept(self, shape: tuple[int, int], options: SurgeonOptions) -> int:
        """See `Sparsifier.n_kept`."""
        return shape[0] * n_kept_of(shape[1], options.sparsity)

    def prune(self, problem: LayerProblem, options: SurgeonOptions) -> Pruned:
        """See `JointSparsifier.prune`; in blocks of 1, with a note, where H is of no use.

        A block needs tokens for its own inputs only, not for all of the layer's.
        """
        inverse, notes = _inverse_blocks(problem, options.block)
        d = problem.weight.shape[1]
        share = n_kept_of(d, options.sparsity) / d
        rounds = range(1, options.recomputations + 1)
        schedule = [round(d * share ** (k / options.recomputations)) for k in rounds]
        n_rows = max(1, _ELEMENTS_AT_ONCE // inverse.numel())
        parts = [
            _prune_rows(rows, inverse, schedule) for rows in torch.split(problem.weight, n_rows)
        ]
        mask, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Pruned(mask, values, notes)


def _inverse_blocks(problem: LayerProblem, block: int) -> tuple[Tensor, tuple[str, ...]]:
    """The inverse of each damped block of H, (blocks, B, B) float32, and notes.

    Inputs that fill up the last block have nothing to do with the others.
    """
    d = problem.weight.shape[1]
    width, reason = min(block, d), ""
    if width > 1:
        if problem.hessian is None:
            reason = problem.unseen
        else:
            inverse = _inverted(problem.hessian, problem.importance, width)
            if inverse is not None:
                return inverse, ()
            reason = "a block of H is not positive definite"
    notes = (f"obs_block took weights one by one: {reason}",) if reason else ()
    return (1 / problem.importance).view(d, 1, 1), notes


def _inverted(hessian: Tensor, diagonal: Tensor, width: int) -> Tensor | None:
    """The inverse blocks of H with `diagonal` for its own; None if one has none."""
    n_blocks = -(-len(hessian) // width)
    padded = torch.eye(n_blocks * width, dtype=torch.float64, device=hessian.device)
    d = len(hessian)
    padded[:d, :d] = hessian
    padded.diagonal()[:d] = diagonal
    places = torch.arange(n_blocks, device=hessian.device)
    blocks = padded.view(n_blocks, width, n_blocks, width)[places, :, places]
    lower, info = torch.linalg.cholesky_ex(blocks)
    return None if bool(info.any()) else torch.cholesky_inverse(lower).float()


def _prune_rows(weight: Tensor, inverse: Tensor, schedule: list[int]) -> tuple[Tensor, Tensor]:
    """Mask and values of rows (rows, d), which are independent of others.

    Args:
        weight: (rows, d).
        inverse: (blocks, B, B).
        schedule: weights of a row that each round keeps.
    """
    n_rows, d = weight.shape
    n_blocks, width = inverse.shape[:2]
    missing = n_blocks * width - d
    values = pad(weight, (0, missing)).view(-1, width)
    there = pad(torch.ones_like(weight), (0, missing)).view(-1, width) > 0
    blocks = _Blocks(values, there, inverse.repeat(n_rows, 1, 1))
    for n_kept in schedule:
        kept = keep_highest(blocks.cost().view(n_rows, -1), n_kept)
        blocks.keep(kept.view(-1, width))
    values = blocks.values().view(n_rows, -1)[:, :d]
    return kept[:, :d].contiguous(), values * kept[:, :d]


class _Blocks:
    """All blocks of some rows: weights (n, B), and inverses (n, B, B) of their survivors."""

    def __init__(self, weights: Tensor, alive: Tensor, inverse: Tensor) -> None:
        self._weights, self._alive, self._inverse = weights.clone(), alive, inverse
        self._places = torch.arange(len(weights), device=weights.device)  # where a block belongs

    def cost(self) -> Tensor:
        """Twice the cost to prune each weight, (n, B); -1 where it is pruned."""
        diagonal = self._inverse.diagonal(dim1=1, dim2=2).clamp(min=_TINY)
        return self._ordered(torch.where(self._alive, self._weights.square() / diagonal, -1.0))

    def values(self) -> Tensor:
        """The weights, (n, B); of no meaning where they are pruned."""
        return self._ordered(self._weights)

    def _ordered(self, tensor: Tensor) -> Tensor:
        ordered = torch.empty_like(tensor)
        ordered[self._places] = tensor
        return ordered

    def keep(self, kept: Tensor) -> None:
        """Prune all but `kept` (n, B).

        Blocks that lose most come first, so that those that still lose a weight are a slice.
        """
        doomed = self._alive & ~kept[self._places]
        order = doomed.sum(1).argsort(descending=True, stable=True)
        doomed = doomed[order]
        self._weights, self._inverse = self._weights[order], self._inverse[order]
        self._alive, self._places = self._alive[order] & ~doomed, self._places[order]
        sequence = doomed.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        n_losing = doomed.sum(1)[:, None] > torch.arange(doomed.shape[1], device=doomed.device)
        for step, n in enumerate(n_losing.sum(0).tolist()):
            if n:
                self._eliminate(sequence[:n, step])

    def _eliminate(self, index: Tensor) -> None:
        """Take weight ``index[i]`` out of block i, for the first ``len(index)`` blocks."""
        n, width = len(index), self._weights.shape[1]
        weights, inverse = self._weights[:n], self._inverse[:n]
        column = inverse.gather(1, index[:, None, None].expand(n, 1, width)).squeeze(1)
        scaled = column / column.gather(1, index[:, None]).clamp(min=_TINY)
        weights.sub_(scaled * weights.gather(1, index[:, None]))
        inverse.baddbmm_(column[:, :, None], scaled[:, None, :], alpha=-1)


METHODS.add("obs_block", BlockSurgeon())
