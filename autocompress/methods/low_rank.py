"""Ranks and balanced factors, shared by the factorizers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.methods.problem import Spectrum


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
