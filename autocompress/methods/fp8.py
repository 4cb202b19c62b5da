"""FP8: eight-bit floats with a scale per row or group.

Formats by Micikevicius et al. 2022 (arXiv 2209.05433), the values being ``scale * float8``. A float
needs no clipping: relative errors are the same at every size. What the scale decides is where the
weights fall between the powers of two, so the group's largest weight is put on each of the numbers
from 240 to 448 in turn, and the one of least importance-weighted error is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from autocompress.core.errors import SchemeError, nearest
from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Quantized
from autocompress.methods.floats import E4M3, E5M2, FloatFormat
from autocompress.methods.levels import GroupOptions, ScaledCoding, kept_weight, storable
from autocompress.methods.problem import LayerProblem

_FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
_PLACES = (240.0, 448.0)  # of the largest weight, in both formats; one power of two


@dataclass(frozen=True, slots=True)
class FP8Options(GroupOptions):
    """Options of FP8.

    Attributes:
        group_size: weights of a row that share a scale; 0: the whole row.
        format: e4m3 (three bits of mantissa) or e5m2 (two, and a wider range).
    """

    group_size: int = 0
    format: str = "e4m3"

    def __post_init__(self) -> None:
        GroupOptions.__post_init__(self)
        if self.format not in _FORMATS:
            raise SchemeError(
                f"format must be e4m3 or e5m2, but got {self.format!r}. "
                f"{nearest(self.format, _FORMATS)}"
            )

    @property
    def levels(self) -> FloatFormat:
        """Of the format."""
        return _FORMATS[self.format]


class FP8(Quantizer[FP8Options]):
    """Eight-bit floats."""

    needs = Needs.DIAGONAL
    options = FP8Options
    summary = "8-bit floats (e4m3 or e5m2) with a float16 scale per row or group"

    def coding(self, options: FP8Options) -> ScaledCoding:
        """See `Quantizer.coding`."""
        return ScaledCoding(options.levels, options.group_size)

    def quantize(
        self, problem: LayerProblem, mask: Tensor | None, options: FP8Options
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        coding, weight = self.coding(options), kept_weight(problem, mask)
        table = options.levels.table
        places = table[(table >= _PLACES[0]) & (table <= _PLACES[1])].tolist()

        def candidates(largest: Tensor) -> Iterator[Tensor]:
            return (storable(largest / place) for place in reversed(places))

        return coding.quantized(weight, coding.best_scales(weight, problem.importance, candidates))


METHODS.add("fp8", FP8())
