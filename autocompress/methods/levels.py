"""Levels times a scale per group: what the fixed number formats share.

A value is ``level * scale``: the level belongs to the code, the scale to a group of consecutive
inputs of a row, of which the last may be shorter. Formats differ in their levels, in which scales
can be stored, and in how many weights share one. Scales are chosen among storable ones by
``sum_j importance_j (w_j - q_j)^2``, so what is measured is what a reload gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.coding import Coding, Damage, Quantized, Stored, is_finite
from autocompress.methods.problem import LayerProblem

_WEIGHTS_AT_ONCE = 1 << 17
_FP16_MAX = 65504.0
_FP16_COARSE = 2.0**-18  # below it float16 is spaced by more than 1 % of a scale

Candidates = Callable[[Tensor], Iterable[Tensor]]
"""Storable scales (rows, G), all positive, for groups whose largest sizes are (rows, G)."""


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """Options of a format whose groups may have any size.

    Attributes:
        group_size: weights of a row that share a scale; 0: the whole row.
    """

    group_size: int = 128

    def __post_init__(self) -> None:
        if self.group_size < 0:
            raise SchemeError(
                "group_size must be 0 (the whole row) or positive, "
                f"but got {self.group_size}. The nearest legal value is 0."
            )


class Levels(ABC):
    """What each code stands for before it is scaled."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def table(self) -> Tensor:
        """The level of each code, (n,) float32, n at most 2^bits."""

    @abstractmethod
    def codes(self, scaled: Tensor) -> Tensor:
        """Codes of the levels nearest to float32 values, uint8."""

    @abstractmethod
    def nearest(self, scaled: Tensor) -> Tensor:
        """The levels nearest to float32 values; ``table[codes(scaled)]``."""

    @cached_property
    def has_unused_codes(self) -> bool:
        """Whether some codes stand for no number."""
        return int(torch.isfinite(self.table).sum()) < 1 << self.bits

    @abstractmethod
    def all_used(self, codes: Tensor) -> bool:
        """Whether all of uint8 codes stand for numbers."""

    def values(self, codes: Tensor) -> Tensor:
        """The levels of uint8 codes, as float32."""
        table = self.table.to(codes.device)
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


@dataclass(frozen=True)
class ListedLevels(Levels):
    """Levels without a rule; codes are places in the list.

    Attributes:
        levels: ascending.
    """

    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        """See `Levels.bits`."""
        return (len(self.levels) - 1).bit_length()

    def all_used(self, codes: Tensor) -> bool:
        """See `Levels.all_used`."""
        return codes.numel() == 0 or int(codes.amax()) < len(self.levels)

    @cached_property
    def table(self) -> Tensor:
        """See `Levels.table`."""
        return torch.tensor(self.levels)

    def codes(self, scaled: Tensor) -> Tensor:
        """See `Levels.codes`; counts the midpoints below, which is faster than to search them."""
        codes = torch.zeros_like(scaled, dtype=torch.uint8)
        for low, high in zip(self.levels, self.levels[1:], strict=False):
            codes += scaled > (low + high) / 2
        return codes

    def nearest(self, scaled: Tensor) -> Tensor:
        """See `Levels.nearest`."""
        return self.values(self.codes(scaled))


@dataclass(frozen=True)
class ScaledCoding(Coding):
    """Levels with a scale per group; scales (o, G) float16 unless a format overrides that.

    Attributes:
        levels: of the codes.
        group_size: weights of a row that share a scale; 0: the whole row.
        scale_codes: the least and the largest that is written, where scales are codes.
    """

    levels: Levels
    group_size: int
    scale_codes: ClassVar[tuple[int, int] | None] = None

    @property
    def bits(self) -> int:
        """See `Coding.bits`."""
        return self.levels.bits

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """See `Coding.parameters`."""
        return {"scales": TensorLayout(self.scales_shape(shape), "float16")}

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(o, G), the ragged last group of a row included."""
        return shape[0], -(-shape[1] // self.width(shape[1]))

    def scales(self, parameters: Stored, rows: Tensor | None) -> Tensor:
        """Scales (rows, G) float32 of some rows, or of all."""
        return taken(parameters["scales"], rows).float()

    def damage(self, stored: Stored, shape: tuple[int, int], n_kept: int | None) -> Damage | None:
        """See `Coding.damage`."""
        if self.scale_codes is not None:
            least, most = (int(x) for x in stored["scales"].aminmax())
            if least < self.scale_codes[0] or most > self.scale_codes[1]:
                legal = "codes from {} to {}".format(*self.scale_codes)
                return Damage("scales", f"must hold {legal}, but holds {least} to {most}")
        if not is_finite(self.scales(stored, None)):
            return Damage("scales", "must give finite scales, but some are NaN or infinite")
        if self.levels.has_unused_codes:
            codes = self.unpack(stored["packed"], shape, n_kept)
            if not self.levels.all_used(codes):
                return Damage("packed", "must hold codes of numbers, but holds others")
        return None

    def width(self, in_features: int) -> int:
        """Weights in a full group of a row of `in_features`."""
        return min(self.group_size or in_features, in_features)

    def values(
        self,
        codes: Tensor,
        parameters: Stored,
        shape: tuple[int, int],
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `Coding.values`."""
        scales, width = self.scales(parameters, rows), self.width(shape[1])
        values = torch.empty(codes.shape, device=codes.device)
        for part in row_blocks(codes):
            torch.mul(
                self.levels.values(codes[part]),
                per_weight(scales[part], width, shape[1]),
                out=values[part],
            )
        return values

    def codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Codes (o, d) uint8 of the levels nearest to float32 weights, given scales (o, G)."""
        divisors = torch.where(scales == 0, 1.0, scales)
        width, d = self.width(weight.shape[1]), weight.shape[1]
        codes = torch.empty_like(weight, dtype=torch.uint8)
        for part in row_blocks(weight):
            scaled = weight[part] / per_weight(divisors[part], width, d)
            codes[part] = self.levels.codes(scaled)
        return codes

    def best_scales(self, weight: Tensor, importance: Tensor, candidates: Candidates) -> Tensor:
        """Per group the candidate of least weighted error, (o, G) float32; of ties the first.

        Args:
            weight: (o, d) float32.
            importance: (d,) float32, positive; diag(H).
            candidates: asked for blocks of rows, from the first to the last.
        """

        def search(block: Tensor, cost: Tensor) -> Tensor:
            found = iter(candidates(block.abs().amax(-1)))
            best = next(found)
            least = self._error(block, cost, best)
            for scale in found:
                error = self._error(block, cost, scale)
                best = torch.where(error < least, scale, best)
                least = torch.minimum(error, least)
            return best

        return by_group(weight, importance, self.width(weight.shape[1]), search)

    def quantized(self, weight: Tensor, scales: Tensor, notes: tuple[str, ...] = ()) -> Quantized:
        """Codes (o, d) on scales (o, G) that float16 holds, which are stored as such."""
        stored = scales.to(torch.float16)
        return Quantized(self.codes(weight, stored.float()), {"scales": stored}, notes)

    def _error(self, block: Tensor, cost: Tensor, scale: Tensor) -> Tensor:
        residual = self.levels.nearest(block / scale[..., None])
        residual.mul_(scale[..., None]).sub_(block)
        return residual.square_().mul_(cost).sum(-1)


def by_group(
    weight: Tensor, importance: Tensor, width: int, find: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """One number per group, (o, G) float32.

    Args:
        weight: (o, d).
        importance: (d,).
        width: weights in a full group.
        find: makes (rows, G) of weights (rows, G, width) and importance (1, G, width); both are
            zero where a ragged last group has ended.
    """
    cost = grouped(importance[None], width)
    return torch.cat([find(grouped(weight[part], width), cost) for part in row_blocks(weight)])


def kept_weight(problem: LayerProblem, mask: Tensor | None) -> Tensor:
    """The weight (o, d), pruned weights zero."""
    return problem.weight if mask is None else problem.weight * mask


def storable(scale: Tensor) -> Tensor:
    """The float16 value of a scale, as float32; never one so small that float16 is coarse."""
    return scale.clamp(_FP16_COARSE, _FP16_MAX).to(torch.float16).to(torch.float32)


def taken(scales: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of a tensor, or all."""
    return scales if rows is None else scales[rows]


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows that bound the memory of what is done to them."""
    n_rows = max(1, _WEIGHTS_AT_ONCE // matrix.shape[1])
    for start in range(0, len(matrix), n_rows):
        yield slice(start, start + n_rows)


def grouped(matrix: Tensor, width: int) -> Tensor:
    """(rows, G, width) of (rows, d), zeros after the end."""
    return functional.pad(matrix, (0, -matrix.shape[1] % width)).view(len(matrix), -1, width)


def per_weight(scales: Tensor, width: int, in_features: int) -> Tensor:
    """(rows, d) of (rows, G)."""
    return scales.repeat_interleave(width, dim=1)[:, :in_features]
