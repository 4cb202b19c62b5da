"""A low-rank correction of what the other stages got wrong, nearest in the layer's outputs.

EoRA (Liu et al. 2024, arXiv 2410.21271): with the error ``D = W - C`` of the compressed matrix C,
the factors ``A B`` of rank r that minimise ``tr((D - A B) H (D - A B)^T)``. Full rank restores W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autocompress.methods.base import METHODS
from autocompress.methods.low_rank import Correction, CorrectionOptions, correction_of
from autocompress.methods.problem import LayerProblem


class EoRA(Correction[CorrectionOptions]):
    """Best low-rank correction of the layer's outputs."""

    options = CorrectionOptions
    summary = "low-rank correction of the error of the stages before it (whitened by the inputs)"
    stronger = "lq_lora"

    def fit(
        self,
        problem: LayerProblem,
        options: CorrectionOptions,
        compressed: Callable[[Tensor], Tensor],
        dtype: torch.dtype,  # noqa: ARG002 - factors have a width of their own
    ) -> tuple[dict[str, Tensor], Tensor, tuple[str, ...]]:
        """See `Residual.fit`; the stages before represent the whole weight."""
        hessian = problem.hessian
        notes: tuple[str, ...] = ()
        if problem.unseen:
            hessian = None
            notes = (f"eora used the plain decomposition: {problem.unseen}",)
        error = problem.weight - compressed(problem.weight)
        return correction_of(error, hessian, options), problem.weight, notes


METHODS.add("eora", EoRA())
