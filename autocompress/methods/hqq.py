"""HQQ: fit zero points to the weights alone, so that few large errors do not decide.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Minimises
``sum |w - s (q - z)|^p``, p = 0.7, over the zero point z of each group, by turns: the shrunken
error ``e = shrink(w - s (q - z))`` with ``shrink(x) = sign(x) relu(|x| - |x|^(p-1) / beta)``, then
``z = mean(q - (w - e) / s)``, with beta growing. z stays a float, so zero is not on the grid. The
scale is that of the group's range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Coding, Quantized, Stored
from autocompress.methods.grid import GridOptions, blocks
from autocompress.methods.problem import LayerProblem

_P = 0.7
_BETA = 10.0  # and the factor by which it grows in each iteration:
_KAPPA = 1.01
_FARTHEST = 512.0  # zero points up to here are float16 to a quarter of a level
_FP16_TINY, _FP16_MAX = 2.0**-24, 65504.0
_WEIGHTS_AT_ONCE = 1 << 17


@dataclass(frozen=True, slots=True)
class HQQOptions:
    """Options of HQQ.

    Attributes:
        bits: 2 to 8.
        group_size: weights of a row that share scale and zero point; 0: the whole row.
        iterations: of the fit of the zero points; 0 keeps those of the range.
    """

    bits: int = 4
    group_size: int = 64
    iterations: int = 20

    def __post_init__(self) -> None:
        GridOptions(self.bits, self.group_size)  # the same rules
        if self.iterations < 0:
            raise SchemeError(
                f"iterations must be 0 or more, but got {self.iterations}. "
                "The nearest legal value is 0."
            )

    @property
    def top(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1

    def width(self, in_features: int) -> int:
        """Weights in a full group of a row of `in_features`."""
        return min(self.group_size or in_features, in_features)


@dataclass(frozen=True, slots=True)
class FloatZeroCoding(Coding):
    """Codes 0 .. 2^b - 1 of ``s (q - z)``: scales and zero points (o, G) float16."""

    options: HQQOptions
    maskable: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        """See `Coding.bits`."""
        return self.options.bits

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """See `Coding.parameters`."""
        layout = TensorLayout((shape[0], -(-shape[1] // self.options.width(shape[1]))), "float16")
        return {"scales": layout, "zeros": layout}

    def values(
        self,
        codes: Tensor,
        parameters: Stored,
        shape: tuple[int, int],
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `Coding.values`."""
        scales, zeros = parameters["scales"].float(), parameters["zeros"].float()
        if rows is not None:
            scales, zeros = scales[rows], zeros[rows]
        values = codes.to(torch.float32)
        for columns, groups in blocks(shape[1], self.options.width(shape[1])):
            view = _grouped(values[:, columns], groups)
            view.sub_(zeros[:, groups, None]).mul_(scales[:, groups, None])
        return values


class HQQ(Quantizer[HQQOptions]):
    """Calibration-free quantization with fitted zero points."""

    needs = Needs.NONE
    options = HQQOptions
    summary = "calibration-free quantization, zero points fitted by half-quadratic splitting"

    def coding(self, options: HQQOptions) -> Coding:
        """See `Quantizer.coding`."""
        return FloatZeroCoding(options)

    def quantize(
        self,
        problem: LayerProblem,
        mask: Tensor | None,  # noqa: ARG002 - the coding is not maskable
        options: HQQOptions,
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        weight = problem.weight
        o, d = weight.shape
        codes = torch.empty_like(weight, dtype=torch.uint8)
        width = options.width(d)
        scales = weight.new_empty((o, -(-d // width)), dtype=torch.float16)
        zeros = torch.empty_like(scales)
        n_rows = max(1, _WEIGHTS_AT_ONCE // d)
        for columns, groups in blocks(d, width):
            for start in range(0, o, n_rows):
                rows = slice(start, start + n_rows)
                block = _grouped(weight[rows, columns], groups)
                scale, zero = fit(block, options)
                scales[rows, groups], zeros[rows, groups] = scale, zero
                codes[rows, columns] = nearest_codes(block, scale, zero, options.top).flatten(1)
        return Quantized(codes, {"scales": scales, "zeros": zeros})


def fit(block: Tensor, options: HQQOptions) -> tuple[Tensor, Tensor]:
    """Scale and zero point (rows, groups) of weights (rows, groups, width), float16.

    Of all zero points on the way, each rounded to float16 before it is measured, every group gets
    that of the least mean absolute error.
    """
    scale, zero = _of_range(block, options.top)
    codes, residual = _rounded(block, scale, zero, options.top)
    best, least = zero, residual.abs().mean(-1)
    beta = _BETA
    for _ in range(options.iterations):
        fitted = codes - (block - _shrink(residual, beta)) / scale.float()[..., None]
        zero = fitted.mean(-1).to(torch.float16)
        codes, residual = _rounded(block, scale, zero, options.top)
        error = residual.abs().mean(-1)
        better = error < least
        best, least = torch.where(better, zero, best), torch.where(better, error, least)
        beta *= _KAPPA
    return scale, best


def nearest_codes(block: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes (rows, groups, width), as float32, of weights of that shape."""
    scaled = block / scale.float()[..., None] + zero.float()[..., None]
    return scaled.round_().clamp_(0, top)


def _of_range(block: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point that just reach the extremes of each group.

    A group far from zero, compared with its range, gets a coarser scale: else its zero point
    would have no digits left in float16.
    """
    low, high = block.amin(-1), block.amax(-1)
    reach = torch.maximum(low.abs(), high.abs()) / _FARTHEST
    scale = torch.maximum((high - low) / top, reach).clamp(_FP16_TINY, _FP16_MAX)
    scale = scale.to(torch.float16)
    return scale, (-low / scale.float()).clamp(-_FARTHEST, _FARTHEST).to(torch.float16)


def _rounded(block: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes, and what they are wrong by."""
    codes = nearest_codes(block, scale, zero, top)
    return codes, block - (codes - zero.float()[..., None]) * scale.float()[..., None]


def _shrink(residual: Tensor, beta: float) -> Tensor:
    """Minimiser over e of ``|e|^p + beta / 2 (e - r)^2``, nearly."""
    size = residual.abs()
    return size.sub_(size.pow(_P - 1).div_(beta)).relu_().mul_(residual.sign())


def _grouped(matrix: Tensor, groups: slice) -> Tensor:
    """A view (rows, groups, width)."""
    return matrix.view(len(matrix), groups.stop - groups.start, -1)


METHODS.add("hqq", HQQ())
