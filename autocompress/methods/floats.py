"""Small floating-point formats: a sign, an exponent, a mantissa, in at most eight bits.

E4M3 and E5M2 are those of Micikevicius et al. 2022 (arXiv 2209.05433), E2M1 and the powers of two
of E8M0 those of the OCP Microscaling specification 1.0 (2023). Codes are the formats' own bits.
Values round to the nearest number, ties to the even mantissa, and saturate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from autocompress.methods.levels import Levels

_FP32_EXPONENT = 0x7F800000
_E8M0_BIAS = 127


@dataclass(frozen=True)
class FloatFormat(Levels):
    """A small floating-point format.

    Attributes:
        exponent_bits: of a code.
        mantissa_bits: of a code.
        top: the largest finite number.
    """

    exponent_bits: int
    mantissa_bits: int
    top: float

    @property
    def bits(self) -> int:
        """See `Levels.bits`."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def least_normal(self) -> float:
        """The smallest number with a full mantissa, a power of two."""
        return 2.0 ** (2 - (1 << (self.exponent_bits - 1)))

    def all_used(self, codes: Tensor) -> bool:
        """See `Levels.all_used`."""
        sizes = codes & ((1 << (self.bits - 1)) - 1)
        top = int(self.codes(torch.tensor(self.top)))
        return codes.numel() == 0 or int(sizes.amax()) <= top

    @cached_property
    def table(self) -> Tensor:
        """See `Levels.table`; codes above the largest number are NaN (or infinite, in E5M2)."""
        fields = torch.arange(1 << (self.bits - 1))
        exponent = (fields >> self.mantissa_bits).clamp(min=1) - 1
        mantissa = fields - (exponent << self.mantissa_bits)
        step = self.least_normal / (1 << self.mantissa_bits)
        sizes = mantissa.float() * step * torch.exp2(exponent.float())
        sizes = torch.where(sizes > self.top, math.nan, sizes)
        return torch.cat([sizes, -sizes])

    def nearest(self, scaled: Tensor) -> Tensor:
        """See `Levels.nearest`."""
        clamped = scaled.clamp(-self.top, self.top)
        power = self._power(clamped)
        steps = 1 << self.mantissa_bits
        return clamped.div_(power).mul_(steps).round_().mul_(power).div_(steps)

    def codes(self, scaled: Tensor) -> Tensor:
        """See `Levels.codes`; zero has the positive sign."""
        level = self.nearest(scaled)
        power = self._power(level)
        steps = level.abs().div_(power).mul_(1 << self.mantissa_bits)
        exponent = torch.frexp(power / self.least_normal).exponent - 1
        field = steps.to(torch.int32) + (exponent << self.mantissa_bits)
        return (field + ((level < 0).to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    def _power(self, values: Tensor) -> Tensor:
        """The largest power of two up to the size of each value, at least `least_normal`."""
        lowest = torch.tensor(self.least_normal).view(torch.int32).item()
        exponents = values.contiguous().view(torch.int32) & _FP32_EXPONENT
        return exponents.clamp_(min=int(lowest)).view(torch.float32)


E2M1 = FloatFormat(2, 1, 6.0)
E4M3 = FloatFormat(4, 3, 448.0)
E5M2 = FloatFormat(5, 2, 57344.0)


def e8m0_codes(powers: Tensor) -> Tensor:
    """Bytes of powers of two between 2^-126 and 2^127, uint8: the exponent plus 127."""
    return (torch.frexp(powers).exponent + (_E8M0_BIAS - 1)).to(torch.uint8)


def e8m0_values(codes: Tensor) -> Tensor:
    """The powers of two of bytes between 1 and 254, float32."""
    return (codes.to(torch.int32) << 23).view(torch.float32)
