"""Ranks and balanced factors, shared by the factorizers and the low-rank corrections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import Multiplier, Needs, Residual
from autocompress.methods.coding import Quantized, Stored
from autocompress.methods.grid import GridCoding, GridOptions, best_grid
from autocompress.methods.problem import Spectrum, spectrum_of
from autocompress.methods.storage import MatrixStorage

_FACTOR_GROUP = 64


@dataclass(frozen=True, slots=True)
class RankOptions:
    """Options that every factorizer has.

    Attributes:
        rank: inner dimension of the factors, at least 1; below break-even for the layer.
    """

    rank: int = 32

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SchemeError(
                f"rank must be at least 1, but got {self.rank}. The nearest legal value is 1."
            )


def split(spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """A (o, r) and B (r, d) float32 with ``A B = U_r U_r^T W``.

    Column i of A and row i of B share their size evenly (for `svd`: the root of the singular
    value each), so that neither needs a wider range than the other.
    """
    outer, inner = spectrum.outer[:, :rank], spectrum.inner[:rank]
    norms = inner.norm(dim=1)
    root = norms.clamp(min=float(norms.max()) * 1e-6 or 1.0).sqrt()
    return outer * root, inner / root[:, None]


@dataclass(frozen=True, slots=True)
class StoredFactors:
    """Factors of a correction in a file: A (o, r) and B (r, d).

    Attributes:
        shape: (o, d).
        rank: r.
        bits: 16 for float16 values; else the width of integers in groups of 64 along the longer
            side of each factor, so that r of any size has full groups.
    """

    shape: tuple[int, int]
    rank: int
    bits: int

    def layout(self) -> dict[str, TensorLayout]:
        """Shapes and dtypes of the stored tensors."""
        return {
            f"{prefix}{name}": layout
            for prefix, storage in self._storage().items()
            for name, layout in storage.layout("float16").items()
        }

    def encode(self, outer: Tensor, inner: Tensor) -> dict[str, Tensor]:
        """The stored tensors of A (o, r) and B (r, d) float32."""
        tensors: dict[str, Tensor] = {}
        for (prefix, storage), factor in zip(
            self._storage().items(), (outer.T.contiguous(), inner), strict=True
        ):
            content: Tensor | Quantized = factor
            if self.bits != 16:
                ones = torch.ones(factor.shape[1], device=factor.device)
                grid = best_grid(factor, ones, self._grid)
                content = grid.quantized(grid.codes(factor))
            encoded = storage.encode(content, None, torch.float16)
            tensors |= {f"{prefix}{name}": tensor for name, tensor in encoded.items()}
        return tensors

    def decode(self, stored: Stored) -> tuple[Tensor, Tensor]:
        """A (o, r) and B (r, d), float32."""
        outer, inner = (s.decode(stored, prefix).float() for prefix, s in self._storage().items())
        return outer.T.contiguous(), inner

    @property
    def _grid(self) -> GridOptions:
        return GridOptions(bits=self.bits, group_size=_FACTOR_GROUP)

    def _storage(self) -> dict[str, MatrixStorage]:
        coding = None if self.bits == 16 else GridCoding(self._grid)
        o, d = self.shape
        shapes = {"a.": (self.rank, o), "b.": (self.rank, d)}
        return {prefix: MatrixStorage(shape, coding, None) for prefix, shape in shapes.items()}


@dataclass(frozen=True, slots=True)
class CorrectionOptions(RankOptions):
    """Options that every low-rank correction has.

    Attributes:
        rank: of the correction, at least 1; at most the smaller side of the layer.
        bits: of its factors: 16 (float16), or 4 to 8 (integers, one scale per group of 64).
    """

    rank: int = 16
    bits: int = 16

    def __post_init__(self) -> None:
        RankOptions.__post_init__(self)
        if self.bits not in (4, 5, 6, 7, 8, 16):
            close = 4 if self.bits < 4 else 8 if self.bits < 12 else 16
            raise SchemeError(
                f"bits of the factors must be 4 to 8, or 16, but got {self.bits}. "
                f"The nearest legal value is {close}."
            )

    def factors(self, shape: tuple[int, int]) -> StoredFactors:
        """How the factors of a matrix (o, d) lie in a file."""
        return StoredFactors(shape, self.rank, self.bits)


CorrectionT = TypeVar("CorrectionT", bound=CorrectionOptions)


class Correction(Residual[CorrectionT]):
    """A low-rank matrix A B beside the rest."""

    needs = Needs.HESSIAN
    adds_to_any = True

    def refusal(self, shape: tuple[int, int], options: CorrectionT) -> str:
        """See `Method.refusal`."""
        if options.rank <= min(shape):
            return ""
        return (
            f"the rank of a correction must be at most {min(shape)}, but got {options.rank}. "
            f"The nearest legal value is {min(shape)}."
        )

    def layout(
        self,
        shape: tuple[int, int],
        options: CorrectionT,
        dtype: str,  # noqa: ARG002 - factors have a width of their own
    ) -> dict[str, TensorLayout]:
        """See `Residual.layout`."""
        return options.factors(shape).layout()

    def values(self, stored: Stored, shape: tuple[int, int], options: CorrectionT) -> Tensor:
        """See `Residual.values`."""
        outer, inner = options.factors(shape).decode(stored)
        return outer @ inner

    def multiplier(
        self, stored: Stored, shape: tuple[int, int], options: CorrectionT
    ) -> Multiplier:
        """See `Residual.multiplier`: two thin products."""
        outer, inner = options.factors(shape).decode(stored)
        return Multiplier(lambda rows: rows @ inner.T @ outer.T, outer.nbytes + inner.nbytes)

    def macs_per_token(self, shape: tuple[int, int], options: CorrectionT) -> int:
        """See `Residual.macs_per_token`."""
        return options.rank * (shape[0] + shape[1])


def correction_of(
    error: Tensor, hessian: Tensor | None, options: CorrectionOptions
) -> dict[str, Tensor]:
    """The stored factors nearest to an error D (o, d) in ``tr((D - A B) H (D - A B)^T)``.

    They are those of SVD-LLM for D (see `spectrum_of`); H None: the plain decomposition.
    """
    outer, inner = split(spectrum_of(error, hessian), options.rank)
    return options.factors((error.shape[0], error.shape[1])).encode(outer, inner)
