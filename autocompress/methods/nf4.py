"""NF4: sixteen levels at quantiles of a normal distribution, with scales that are quantized too.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314, sections 3 and appendix E): half of the levels are
the quantiles of the negative side, half those of the positive one, scaled to [-1, 1], with an exact
zero. Double quantization stores scales less their mean as 8-bit floats (E4M3), each 256 of them
with a float32 scale of their own. The paper scales a group by its largest weight; here a smaller or
larger scale is taken where that lowers the importance-weighted error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Quantized, Stored
from autocompress.methods.floats import E4M3
from autocompress.methods.levels import (
    GroupOptions,
    ListedLevels,
    ScaledCoding,
    kept_weight,
    storable,
    taken,
)
from autocompress.methods.problem import LayerProblem

NF4_LEVELS = (
    -1.0, -0.6961928010, -0.5250730515, -0.3949174881,
    -0.2844413817, -0.1847734302, -0.0910500363, 0.0,
    0.0795802996, 0.1609302014, 0.2461123019, 0.3379152417,
    0.4407098293, 0.5626170039, 0.7229568362, 1.0,
)  # fmt: skip
_LEVELS = ListedLevels(NF4_LEVELS)
# Factors on the scale that puts the largest weight on 1. All keep it nearest to 1.
_FACTORS = (1.0, 1.12, 1.06, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68)
_SCALES_PER_BLOCK = 256


@dataclass(frozen=True, slots=True)
class NF4Options(GroupOptions):
    """Options of NF4.

    Attributes:
        group_size: weights of a row that share a scale; 0: the whole row.
        double_quantization: store scales in 8 bits instead of float16.
    """

    group_size: int = 64
    double_quantization: bool = True


@dataclass(frozen=True)
class DoubleCoding(ScaledCoding):
    """NF4 codes with scales (o, G) as E4M3 bytes.

    Beside them a float32 scale for each 256 of them, in row order, and their float32 mean.
    """

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """See `Coding.parameters`."""
        scales = self.scales_shape(shape)
        n_blocks = -(-scales[0] * scales[1] // _SCALES_PER_BLOCK)
        return {
            "scales": TensorLayout(scales, "uint8"),
            "block_scales": TensorLayout((n_blocks,), "float32"),
            "mean_scale": TensorLayout((1,), "float32"),
        }

    def scales(self, parameters: Stored, rows: Tensor | None) -> Tensor:
        """See `ScaledCoding.scales`."""
        codes = taken(parameters["scales"], rows)
        n_groups, device = codes.shape[1], codes.device
        numbers = torch.arange(len(codes), device=device) if rows is None else rows
        places = numbers[:, None] * n_groups + torch.arange(n_groups, device=device)
        blocks = parameters["block_scales"][places // _SCALES_PER_BLOCK]
        return E4M3.values(codes) * blocks + parameters["mean_scale"]


class NF4(Quantizer[NF4Options]):
    """Levels at quantiles of a normal distribution."""

    needs = Needs.DIAGONAL
    options = NF4Options
    summary = "NF4: 4-bit quantiles of a normal distribution, scales quantized to 8 bits"

    def coding(self, options: NF4Options) -> ScaledCoding:
        """See `Quantizer.coding`."""
        kind = DoubleCoding if options.double_quantization else ScaledCoding
        return kind(_LEVELS, options.group_size)

    def quantize(
        self, problem: LayerProblem, mask: Tensor | None, options: NF4Options
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        coding, weight = self.coding(options), kept_weight(problem, mask)
        scales = coding.best_scales(weight, problem.importance, _candidates)
        if not options.double_quantization:
            return coding.quantized(weight, scales)
        stored = _encode_scales(scales)
        return Quantized(coding.codes(weight, coding.scales(stored, None)), stored)


def _candidates(largest: Tensor) -> Iterator[Tensor]:
    return (storable(largest * factor) for factor in _FACTORS)


def _encode_scales(scales: Tensor) -> dict[str, Tensor]:
    """Scales (o, G) as a file holds them."""
    mean = scales.double().mean().float()
    rest = (scales - mean).view(-1)
    blocks = functional.pad(rest, (0, -len(rest) % _SCALES_PER_BLOCK)).view(-1, _SCALES_PER_BLOCK)
    block_scales = blocks.abs().amax(1) / E4M3.top
    divisors = torch.where(block_scales == 0, 1.0, block_scales)
    codes = E4M3.codes(blocks / divisors[:, None]).view(-1)[: len(rest)]
    return {
        "scales": codes.view(scales.shape).clone(),
        "block_scales": block_scales,
        "mean_scale": mean.view(1),
    }


METHODS.add("nf4", NF4())
