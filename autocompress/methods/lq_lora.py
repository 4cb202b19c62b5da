"""A low-rank correction and the other stages, fitted to each other in turns.

LQ-LoRA (Guo et al. 2024, arXiv 2311.12023) and LoftQ (Li et al. 2024, arXiv
2310.08659): the stages before it compress ``W - A B``, then ``A B`` is fitted to ``W - C`` of what
they made of it, until the error rises. Both measure plain or diagonally weighted errors; here it is
``tr(D H D^T)``. The first turn is `eora`, and the best turn is kept, so this loses no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.methods.base import METHODS
from autocompress.methods.low_rank import Correction, CorrectionOptions, correction_of
from autocompress.methods.problem import LayerProblem, LayerStatistics


@dataclass(frozen=True, slots=True)
class LQLoRAOptions(CorrectionOptions):
    """Options of the correction.

    Attributes:
        rank: of the correction, at least 1; at most the smaller side of the layer.
        bits: of its factors: 16 (float16), or 4 to 8 (integers, one scale per group of 64).
        iterations: turns after the first, at most; at least 1.
    """

    iterations: int = 5

    def __post_init__(self) -> None:
        CorrectionOptions.__post_init__(self)
        if self.iterations < 1:
            raise SchemeError(
                f"iterations must be at least 1, but got {self.iterations}. "
                "The nearest legal value is 1; for none, use eora."
            )


class LQLoRA(Correction[LQLoRAOptions]):
    """Low-rank correction in turns with the stages before it."""

    options = LQLoRAOptions
    summary = "low-rank correction fitted in turns with the stages before it"

    def fit(
        self,
        problem: LayerProblem,
        options: LQLoRAOptions,
        compressed: Callable[[Tensor], Tensor],
        dtype: torch.dtype,  # noqa: ARG002 - factors have a width of their own
    ) -> tuple[dict[str, Tensor], Tensor, tuple[str, ...]]:
        """See `Residual.fit`."""
        weight, judge = problem.weight, problem
        notes: tuple[str, ...] = ()
        if problem.unseen:
            judge = LayerProblem(weight, LayerStatistics.none())
            notes = (f"lq_lora used the plain decomposition: {problem.unseen}",)
        target, lowest = weight, math.inf
        best: tuple[dict[str, Tensor], Tensor] = {}, weight
        for _ in range(1 + options.iterations):
            matrix = compressed(target)
            stored = correction_of(weight - matrix, judge.hessian, options)
            part = self.values(stored, (weight.shape[0], weight.shape[1]), options)
            loss = judge.loss(matrix + part)
            if loss >= lowest:
                break
            lowest, best = loss, (stored, target)
            target = weight - part
        return *best, notes


METHODS.add("lq_lora", LQLoRA())
