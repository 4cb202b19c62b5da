"""Integer inputs, one scale per token, found while the layer runs.

Dynamic per-token quantization of activations (ZeroQuant, Yao et al. 2022, arXiv 2206.01861, section
4.1): symmetric, ``s = max_j |x_j| / (2^(b-1) - 1)``. Together with quantized weights the product is
one of integers. `outliers` before it leaves the loudest inputs out (LLM.int8, Dettmers et al. 2022,
arXiv 2208.07339); `smoothquant`, `awq` or `hadamard` make the inputs more even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.methods.base import METHODS, InputQuantizer


@dataclass(frozen=True, slots=True)
class IntInputsOptions:
    """Options of the rounding.

    Attributes:
        bits: 4 to 8.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 4 <= self.bits <= 8:
            raise SchemeError(
                f"bits of the inputs must be 4 to 8, but got {self.bits}. "
                f"The nearest legal value is {min(max(self.bits, 4), 8)}."
            )

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1


class IntInputs(InputQuantizer[IntInputsOptions]):
    """Each token of the layer's input on an integer grid of its own."""

    options = IntInputsOptions
    summary = "round the layer's inputs to integers, one scale per token, while it runs"

    def quantized(self, inputs: Tensor, options: IntInputsOptions) -> Tensor:
        """See `InputQuantizer.quantized`; a token of zeros stays zero."""
        scale = inputs.abs().amax(-1, keepdim=True) / options.largest
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return (inputs / scale).round_().mul_(scale)

    def error(self, hessian: Tensor, options: IntInputsOptions) -> Tensor:
        """See `InputQuantizer.error`: ``s^2 / 12`` for inputs much larger than s.

        The largest input of a token is taken for that of d Gaussian ones of these variances.
        """
        variances = hessian.diagonal().clamp(min=0)
        typical = 2 * math.log(max(len(variances), 2)) * variances.mean()
        scale_squared = torch.maximum(variances.max(), typical) / options.largest**2
        return torch.minimum(variances, scale_squared / 12)


METHODS.add("int_inputs", IntInputs())
