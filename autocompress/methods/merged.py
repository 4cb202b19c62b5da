"""One matrix for several experts of a block: merged experts.

Li et al. 2024 (arXiv 2310.01334, MC-SMoE): experts are merged weighted by how often the router
picks them, ``M = sum_i n_i W_i / sum_i n_i``. Here each counts with all that its tokens say, the
mean that is nearest in the experts' outputs, ``argmin sum_i n_i tr((W_i - M) H_i (W_i - M)^T) =
(sum_i W_i n_i H_i) (sum_i n_i H_i)^-1``; or the matrix of the expert that is used most stands for
all. Routers stay as they are: a token is computed with the merged expert wherever it was sent to
one of them. Neurons are not matched by permutation first, so experts should be alike as they are,
as those that grew from one dense layer are; a correction such as ``eora`` gives each its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError, nearest
from autocompress.core.layer import EXPERTS, Among
from autocompress.methods.base import METHODS, Needs
from autocompress.methods.problem import LayerProblem, LayerStatistics
from autocompress.methods.sharing import Tie, nearest_mean, pooled_statistics, read_numbers

_KINDS = ("mean", "busiest")


@dataclass(frozen=True, slots=True)
class MergedOptions:
    """Options of `merged`.

    Attributes:
        to: ``mean`` of the experts, weighted by their tokens, or the ``busiest`` of them, which
            most tokens are sent to.
        experts: numbers of the experts that are merged, as ``0/3``; a search space says them by
            `expert_groups`.
    """

    to: str = "mean"
    experts: str = ""

    def __post_init__(self) -> None:
        if self.to not in _KINDS:
            raise SchemeError(
                f"to must be mean or busiest, but got {self.to!r}. {nearest(self.to, _KINDS)}"
            )
        read_numbers(self.experts, EXPERTS)


class Merged(Tie[MergedOptions]):
    """One matrix for experts of a block."""

    among: ClassVar[Among] = EXPERTS
    needs = Needs.HESSIAN
    options = MergedOptions
    summary = "one matrix for several experts of a block, weighted by the tokens sent to each"

    def target(
        self, problems: Sequence[LayerProblem], options: MergedOptions
    ) -> tuple[Tensor, tuple[str, ...]]:
        """See `Tie.target`. Experts that no token was sent to have no say."""
        seen = _seen(problems)
        if not seen:
            mean = torch.stack([problem.weight for problem in problems]).mean(0)
            return mean, ("merged used the plain mean: no expert has calibration statistics",)
        busiest = max(seen, key=lambda problem: problem.n_tokens)  # the first of equals
        alike = all(torch.equal(problem.weight, busiest.weight) for problem in seen)
        if options.to == "busiest" or alike:
            return busiest.weight, ()
        return nearest_mean(seen, [problem.n_tokens for problem in seen]), ()

    def statistics(self, problems: Sequence[LayerProblem]) -> LayerStatistics:
        """See `Tie.statistics`: of all tokens that are sent to any of the experts."""
        seen = _seen(problems)
        return pooled_statistics(seen) if seen else LayerStatistics.none()


def _seen(problems: Sequence[LayerProblem]) -> list[LayerProblem]:
    return [problem for problem in problems if problem.hessian is not None and problem.n_tokens]


METHODS.add("merged", Merged())
