"""NVFP4: four-bit floats (E2M1), an eight-bit float scale (E4M3) per 16 inputs, one float32 scale.

Format by NVIDIA (2025, arXiv 2509.25149, appendix A). The float32 scale puts the largest weight of
the matrix on 6 times 448, the largest product of code and block scale. A block's scale puts its
largest weight on 6, or on 4, which leaves finer steps below it (Cook et al. 2025, arXiv
2512.02010), or is a neighbour of these two, whichever has the least importance-weighted error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Quantized, Stored
from autocompress.methods.floats import E2M1, E4M3
from autocompress.methods.levels import ScaledCoding, kept_weight, taken
from autocompress.methods.problem import LayerProblem

_BLOCK = 16
_LAST_CODE = 126  # of 448
_HALVES_FROM = 16  # the code of the first of scales whose halves are scales
_MANTISSA = 1 << 16
_LEAST = 2.0**-110


@dataclass(frozen=True, slots=True)
class NVFP4Options:
    """NVFP4 leaves nothing to choose."""


@dataclass(frozen=True)
class NVFP4Coding(ScaledCoding):
    """E2M1 codes with scales (o, G) in E4M3, as uint8, and one float32 scale of the matrix."""

    scale_codes: ClassVar[tuple[int, int] | None] = (1, _LAST_CODE)

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """See `Coding.parameters`."""
        scales = TensorLayout(self.scales_shape(shape), "uint8")
        return {"scales": scales, "matrix_scale": TensorLayout((1,), "float32")}

    def scales(self, parameters: Stored, rows: Tensor | None) -> Tensor:
        """See `ScaledCoding.scales`."""
        return E4M3.values(taken(parameters["scales"], rows)) * parameters["matrix_scale"]


class NVFP4(Quantizer[NVFP4Options]):
    """Four-bit floats in blocks with an eight-bit float."""

    needs = Needs.DIAGONAL
    options = NVFP4Options
    summary = "NVFP4: 4-bit floats, one 8-bit float per 16 weights"

    def coding(self, options: NVFP4Options) -> ScaledCoding:  # noqa: ARG002 - there are none
        """See `Quantizer.coding`."""
        return NVFP4Coding(E2M1, _BLOCK)

    def quantize(
        self, problem: LayerProblem, mask: Tensor | None, options: NVFP4Options
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        coding, weight = self.coding(options), kept_weight(problem, mask)
        top = weight.abs().max()
        unit = _matrix_scale(top)

        def candidates(largest: Tensor) -> Iterator[Tensor]:
            return (E4M3.values(code) * unit for code in _scale_codes(largest, top, unit))

        scales = coding.best_scales(weight, problem.importance, candidates)
        stored = {"scales": E4M3.codes(scales / unit), "matrix_scale": unit.view(1)}
        return Quantized(coding.codes(weight, scales), stored)


def _matrix_scale(top: Tensor) -> Tensor:
    """``top / (6 * 448)``, rounded up to 16 bits.

    So few that its product with a code and a block scale is exact in float32: tools that multiply
    in another order, or read the result to compress it again, get the same matrix.
    """
    mantissa, exponent = torch.frexp((top / (E2M1.top * E4M3.top)).clamp(min=_LEAST))
    return torch.ldexp(torch.ceil(mantissa * _MANTISSA) / _MANTISSA, exponent)


def _scale_codes(largest: Tensor, top: Tensor, unit: Tensor) -> Iterator[Tensor]:
    """E4M3 codes (rows, G) of scales for blocks whose largest sizes are (rows, G).

    The block that holds the largest weight of the matrix keeps the largest scale, by which a reader
    finds the float32 scale again.
    """
    usual = E4M3.codes(largest / unit / 6).to(torch.int32)
    finer = E4M3.codes(largest / unit / 4).to(torch.int32)
    # Where half a scale may be none, a block whose largest weight falls to 3 has no other scale.
    coarser = torch.where(finer < _HALVES_FROM, finer, finer + 1)
    for code in (usual, usual + 1, usual - 1, finer, coarser, finer - 1):
        legal = code.clamp(1, _LAST_CODE)
        yield torch.where(largest >= top, _LAST_CODE, legal).to(torch.uint8)


METHODS.add("nvfp4", NVFP4())
