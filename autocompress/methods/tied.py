"""One matrix for layers of adjacent blocks; what is each layer's own is a correction after it.

Bae et al. 2025 (arXiv 2410.20672, Relaxed Recursive Transformers): ``W_i = M + A_i B_i``, tied
layers with low-rank parts of their own. M is the mean that is nearest in the layers' outputs,
``argmin sum_i tr((W_i - M) H_i (W_i - M)^T) = (sum_i W_i H_i) (sum_i H_i)^-1``, or the matrix of
the first layer. The stages after it sparsify and quantize M alone; a correction such as ``eora``
gives each layer its own part. Without one, the layers are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError, nearest
from autocompress.methods.base import METHODS, Needs
from autocompress.methods.problem import LayerProblem
from autocompress.methods.sharing import Tie, nearest_mean, read_numbers

_KINDS = ("mean", "first")


@dataclass(frozen=True, slots=True)
class TiedOptions:
    """Options of `tied`.

    Attributes:
        to: ``mean`` of the layers, weighted by their inputs, or the ``first`` of them.
        blocks: numbers in the names of the layers that share, as ``0/1``; a search space says it
            by `span`.
    """

    to: str = "mean"
    blocks: str = ""

    def __post_init__(self) -> None:
        if self.to not in _KINDS:
            raise SchemeError(
                f"to must be mean or first, but got {self.to!r}. {nearest(self.to, _KINDS)}"
            )
        read_numbers(self.blocks)


class Tied(Tie[TiedOptions]):
    """One matrix for all."""

    needs = Needs.HESSIAN
    options = TiedOptions
    summary = "one matrix for layers of adjacent blocks; follow it by a correction of each"

    def needs_of(self, options: TiedOptions) -> Needs:
        """See `Method.needs_of`."""
        return Needs.HESSIAN if options.to == "mean" else Needs.NONE

    def target(
        self, problems: Sequence[LayerProblem], options: TiedOptions
    ) -> tuple[Tensor, tuple[str, ...]]:
        """See `Tie.target`."""
        if options.to == "first":
            return problems[0].weight, ()
        if any(problem.hessian is None for problem in problems):
            mean = torch.stack([problem.weight for problem in problems]).mean(0)
            return mean, ("tied used the plain mean: a layer has no calibration statistics",)
        return nearest_mean(problems, [1.0] * len(problems)), ()


METHODS.add("tied", Tied())
