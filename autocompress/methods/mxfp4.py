"""MXFP4: four-bit floats (E2M1) whose blocks of 32 inputs share a power of two (E8M0).

OCP Microscaling specification 1.0 (2023). The specification's scale is the power of two that puts
the largest weight of the block between 4 and 8; here it is doubled or halved where that lowers the
importance-weighted error. Any reader of MXFP4 can read the result: codes are the E2M1 nibbles, the
earlier weight in the lower half of a byte, scales the E8M0 bytes.
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
from autocompress.methods.floats import E2M1, e8m0_codes, e8m0_values
from autocompress.methods.levels import ScaledCoding, kept_weight, taken
from autocompress.methods.problem import LayerProblem

_BLOCK = 32
_LEAST, _MOST = -126, 125  # exponents whose products with E2M1 are finite in float32


@dataclass(frozen=True, slots=True)
class MXFP4Options:
    """MXFP4 leaves nothing to choose."""


@dataclass(frozen=True)
class MXFP4Coding(ScaledCoding):
    """E2M1 codes with scales (o, G) in E8M0, as uint8."""

    scale_codes: ClassVar[tuple[int, int] | None] = (_LEAST + 127, _MOST + 127)

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """See `Coding.parameters`."""
        return {"scales": TensorLayout(self.scales_shape(shape), "uint8")}

    def scales(self, parameters: Stored, rows: Tensor | None) -> Tensor:
        """See `ScaledCoding.scales`."""
        return e8m0_values(taken(parameters["scales"], rows))


class MXFP4(Quantizer[MXFP4Options]):
    """Four-bit floats in blocks with a power of two."""

    needs = Needs.DIAGONAL
    options = MXFP4Options
    summary = "OCP MXFP4: 4-bit floats, one power of two per 32 weights"

    def coding(self, options: MXFP4Options) -> ScaledCoding:  # noqa: ARG002 - there are none
        """See `Quantizer.coding`."""
        return MXFP4Coding(E2M1, _BLOCK)

    def quantize(
        self, problem: LayerProblem, mask: Tensor | None, options: MXFP4Options
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        coding, weight = self.coding(options), kept_weight(problem, mask)
        scales = coding.best_scales(weight, problem.importance, _neighbours)
        return Quantized(coding.codes(weight, scales), {"scales": e8m0_codes(scales)})


def _neighbours(largest: Tensor) -> Iterator[Tensor]:
    """The power of two of the specification, that above and that below."""
    exponent = torch.frexp(largest).exponent - 3  # frexp's mantissa is between 1/2 and 1
    for step in (0, 1, -1):
        yield e8m0_values(((exponent + step).clamp(_LEAST, _MOST) + 127).to(torch.uint8))


METHODS.add("mxfp4", MXFP4())
