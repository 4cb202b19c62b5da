"""A low-rank correction of what the other stages got wrong, nearest in the layer's outputs.

EoRA (Liu et al. 2024, arXiv 2410.21271): with the error ``D = W - C`` of the compressed matrix C,
the factors ``A B`` of rank r that minimise ``tr((D - A B) H (D - A B)^T)``. They are those of
SVD-LLM for D (see `spectrum_of`); without statistics the plain decomposition of D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Residual
from autocompress.methods.coding import Stored
from autocompress.methods.low_rank import RankOptions, StoredFactors, split
from autocompress.methods.problem import LayerProblem, spectrum_of


@dataclass(frozen=True, slots=True)
class EoRAOptions(RankOptions):
    """Options of the correction.

    Attributes:
        rank: of the correction.
        bits: of its factors: 16 (float16), or 4 to 8 (integers, one scale per group of 64).
    """

    rank: int = 16
    bits: int = 16

    def __post_init__(self) -> None:
        RankOptions.__post_init__(self)
        if self.bits not in (4, 5, 6, 7, 8, 16):
            raise SchemeError(
                f"bits of the factors must be 4 to 8, or 16, but got {self.bits}. "
                f"The nearest legal value is {16 if self.bits > 8 else 4}."
            )

    def factors(self, shape: tuple[int, int]) -> StoredFactors:
        """How the factors of a matrix (o, d) lie in a file."""
        return StoredFactors(shape, self.rank, self.bits)


class EoRA(Residual[EoRAOptions]):
    """Best low-rank correction of the layer's outputs."""

    needs = Needs.HESSIAN
    options = EoRAOptions
    summary = "low-rank correction of the error of the stages before it (whitened by the inputs)"

    def refusal(self, shape: tuple[int, int], options: EoRAOptions) -> str:
        """See `Method.refusal`."""
        if options.rank <= min(shape):
            return ""
        return (
            f"the rank of eora must be at most {min(shape)}, but got {options.rank}. "
            f"The nearest legal value is {min(shape)}."
        )

    def layout(
        self,
        shape: tuple[int, int],
        options: EoRAOptions,
        dtype: str,  # noqa: ARG002 - factors have a width of their own
    ) -> dict[str, TensorLayout]:
        """See `Residual.layout`."""
        return options.factors(shape).layout()

    def fit(
        self,
        problem: LayerProblem,
        options: EoRAOptions,
        compressed: Callable[[Tensor], Tensor],
        dtype: torch.dtype,  # noqa: ARG002
    ) -> tuple[dict[str, Tensor], Tensor, tuple[str, ...]]:
        """See `Residual.fit`; the stages before represent the whole weight."""
        error = problem.weight - compressed(problem.weight)
        notes: tuple[str, ...] = ()
        hessian = problem.hessian
        if problem.too_few_tokens:
            hessian = None
            notes = (f"eora used the plain decomposition: {problem.too_few_tokens}",)
        outer, inner = split(spectrum_of(error, hessian), options.rank)
        stored = options.factors((error.shape[0], error.shape[1])).encode(outer, inner)
        return stored, problem.weight, notes

    def values(self, stored: Stored, shape: tuple[int, int], options: EoRAOptions) -> Tensor:
        """See `Residual.values`."""
        outer, inner = options.factors(shape).decode(stored)
        return outer @ inner

    def macs_per_token(self, shape: tuple[int, int], options: EoRAOptions) -> int:
        """See `Residual.macs_per_token`."""
        return options.rank * (shape[0] + shape[1])


METHODS.add("eora", EoRA())
