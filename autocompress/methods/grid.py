"""The integer grid of the quantizers: bits, groups, scales, zero points.

Groups of `group_size` consecutive inputs of a row share a scale; the last group of a row may be
shorter. Scales are rounded to float16 before any code is computed, so what is measured is what a
reload gives. Zero is on every grid, exactly.

* symmetric, b bits: levels -2^(b-1) .. 2^(b-1)-1, stored with an offset of 2^(b-1). The scale
  may be negative: the longer side gets the extra level.
* asymmetric: codes 0 .. 2^b - 1 with an integer zero point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.coding import Coding, Quantized, Stored
from autocompress.methods.packing import pack, packed_bytes, unpack, unpack_some
from autocompress.methods.problem import LayerProblem

_FP16_MAX = 65504.0
NEARLY_HALF = 0.49
"""Of a step: what is moved so far from a level still rounds to it, whatever the last digit."""

_FP16_TINY = 2.0**-24
_ROWS_AT_ONCE = 1 << 17  # elements; a few buffers of this size fit the second-level cache


@dataclass(frozen=True, slots=True)
class GridOptions:
    """Options that every quantizer has.

    Attributes:
        bits: 2 to 8.
        group_size: weights of a row that share a scale; 0: the whole row.
        symmetric: no zero points.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SchemeError(
                f"bits must be 2 to 8, but got {self.bits}. "
                f"The nearest legal value is {min(max(self.bits, 2), 8)}."
            )
        if self.group_size < 0:
            raise SchemeError(
                "group_size must be 0 (the whole row) or positive, "
                f"but got {self.group_size}. The nearest legal value is 0."
            )

    @property
    def n_levels(self) -> int:
        """2^bits."""
        return 1 << self.bits

    @property
    def offset(self) -> int:
        """Code of zero on a symmetric grid."""
        return 1 << (self.bits - 1)

    def width(self, in_features: int) -> int:
        """Weights in a full group of a row of `in_features`."""
        return min(self.group_size or in_features, in_features)

    def n_groups(self, in_features: int) -> int:
        """Groups in a row of `in_features`, the ragged last one included."""
        return -(-in_features // self.width(in_features))


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales (o, G) float16 and zero points (o, G) uint8, None on a symmetric grid."""

    options: GridOptions
    scales: Tensor
    zeros: Tensor | None

    @property
    def float_zeros(self) -> Tensor:
        """Code of zero per group, (o, G) or (1, 1) float32."""
        if self.zeros is None:
            return self.scales.new_full((1, 1), self.options.offset, dtype=torch.float32)
        return self.zeros.to(torch.float32)

    @classmethod
    def of_all(cls, parts: Sequence[Grid]) -> Grid:
        """That of all rows, from those of slices of them."""
        zeros = [part.zeros for part in parts if part.zeros is not None]
        scales = torch.cat([part.scales for part in parts])
        return cls(parts[0].options, scales, torch.cat(zeros) if zeros else None)

    def of_rows(self, part: slice) -> Grid:
        """That of some rows."""
        zeros = None if self.zeros is None else self.zeros[part]
        return Grid(self.options, self.scales[part], zeros)

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes of a float32 matrix (o, d), as uint8."""
        codes = torch.empty_like(weight, dtype=torch.uint8)
        scales, zeros = self.scales.float(), self.float_zeros.expand(self.scales.shape)
        width = self.options.width(weight.shape[1])
        for columns, groups in blocks(weight.shape[1], width):
            scaled = _grouped(weight, columns, groups) / scales[:, groups, None]
            scaled.round_().add_(zeros[:, groups, None]).clamp_(0, self.options.n_levels - 1)
            codes[:, columns] = scaled.flatten(1).to(torch.uint8)
        return codes

    def dense(self, codes: Tensor) -> Tensor:
        """Values of uint8 codes (o, d), as float32."""
        values = codes.to(torch.float32)
        scales, zeros = self.scales.float(), self.float_zeros.expand(self.scales.shape)
        for columns, groups in blocks(codes.shape[1], self.options.width(codes.shape[1])):
            view = _grouped(values, columns, groups)
            view.sub_(zeros[:, groups, None]).mul_(scales[:, groups, None])
        return values

    def quantized(self, codes: Tensor, notes: tuple[str, ...] = ()) -> Quantized:
        """Codes (o, d) uint8 on this grid."""
        parameters = {"scales": self.scales}
        if self.zeros is not None:
            parameters["zeros"] = pack(self.zeros, self.options.bits)
        return Quantized(codes, parameters, notes)


@dataclass(frozen=True, slots=True)
class GridCoding(Coding):
    """Codes on an integer grid: scales (o, G) float16 and, if asymmetric, packed zero points."""

    options: GridOptions

    @property
    def bits(self) -> int:
        """See `Coding.bits`."""
        return self.options.bits

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """See `Coding.parameters`."""
        scales = (shape[0], self.options.n_groups(shape[1]))
        layout = {"scales": TensorLayout(scales, "float16")}
        if not self.options.symmetric:
            n_bytes = packed_bytes(scales[0] * scales[1], self.options.bits)
            layout["zeros"] = TensorLayout((n_bytes,), "uint8")
        return layout

    def values(
        self,
        codes: Tensor,
        parameters: Stored,
        shape: tuple[int, int],  # noqa: ARG002 - the scales have it
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `Coding.values`."""
        return self.grid(parameters, rows).dense(codes)

    def grid(self, parameters: Stored, rows: Tensor | None = None) -> Grid:
        """The grid of all rows, or of some, from what is stored."""
        scales, bits = parameters["scales"], self.options.bits
        chosen = scales if rows is None else scales[rows]
        if self.options.symmetric:
            return Grid(self.options, chosen, None)
        if rows is None:
            zeros = unpack(parameters["zeros"], bits, scales.numel()).view(scales.shape)
            return Grid(self.options, scales, zeros)
        n_groups = scales.shape[1]
        places = rows[:, None] * n_groups + torch.arange(n_groups, device=rows.device)
        return Grid(self.options, chosen, unpack_some(parameters["zeros"], bits, places))


def blocks(in_features: int, width: int) -> Iterator[tuple[slice, slice]]:
    """(columns, groups) of the full groups, then of the ragged last one if there is one."""
    n_full = in_features // width
    yield slice(0, n_full * width), slice(0, n_full)
    if n_full * width < in_features:
        yield slice(n_full * width, in_features), slice(n_full, n_full + 1)


def round_to_nearest(
    problem: LayerProblem, mask: Tensor | None, options: GridOptions, notes: tuple[str, ...] = ()
) -> Quantized:
    """Each weight to the nearest level of the best grid; pruned weights to exactly zero."""
    weight = problem.weight if mask is None else problem.weight * mask
    grid = best_grid(weight, problem.importance, options)
    return grid.quantized(grid.codes(weight), notes)


def best_grid(weight: Tensor, importance: Tensor, options: GridOptions) -> Grid:
    """Per group the scale, and zero point, that minimise ``sum_j importance_j (w_j - q_j)^2``.

    Args:
        weight: (o, d) float32; zeros cost nothing on any grid.
        importance: (d,) float32, positive; diag(H).
        options: bits, group size, symmetry.
    """
    o, d = weight.shape
    width = options.width(d)
    scales = weight.new_empty(o, options.n_groups(d))
    zeros = torch.zeros_like(scales)
    n_rows = max(1, _ROWS_AT_ONCE // d)
    for columns, groups in blocks(d, width):
        weights = _grouped(importance[None], columns, groups)
        for start in range(0, o, n_rows):
            rows = slice(start, start + n_rows)
            block = _grouped(weight[rows], columns, groups)
            scales[rows, groups], zeros[rows, groups] = _search(block, weights, options)
    stored = None if options.symmetric else zeros.to(torch.uint8)
    return Grid(options, scales.to(torch.float16), stored)


def _grouped(matrix: Tensor, columns: slice, groups: slice) -> Tensor:
    """A view (o, groups, width) of columns that hold whole groups."""
    n_groups = groups.stop - groups.start
    width = (columns.stop - columns.start) // max(n_groups, 1)
    return matrix[:, columns].view(len(matrix), n_groups, width)


def _search(block: Tensor, importance: Tensor, options: GridOptions) -> tuple[Tensor, Tensor]:
    """Best (scale, zero) per group of `block` (rows, groups, width).

    Clips by every factor of a coarse ladder, then of a finer one around the best; tries the zero
    points next to it; ends with the least-squares scale for the codes found. A candidate is kept
    only if it measures better, after rounding to float16.
    """
    scale, zero = _widest(block, options)
    best = _Best(block, importance, options.n_levels - 1, scale, zero)
    ladder = _LADDERS[options.bits]
    for factor in ladder:
        for step in (-1, 0, 1) if not options.symmetric and options.bits <= 3 else (0,):
            best.consider(scale * factor, zero + step)
        if options.symmetric:
            best.consider(scale * -factor, zero)
    spacing = scale.abs() * (ladder[0] - ladder[1])
    for share in (0.5, -0.5, 0.25, -0.25):
        best.consider(best.scale + best.scale.sign() * spacing * share, best.zero)
    if not options.symmetric:
        for step in (-1, 1):
            best.consider(best.scale, best.zero + step)
    for _ in range(2):
        best.consider(best.least_squares(), best.zero)
    return best.scale, best.zero


def _ladder(bits: int) -> tuple[float, ...]:
    """Factors on the widest scale: fewer bits clip more.

    On a symmetric grid the widest scale clips the shorter side only; the first factor clips none.
    """
    first = (1 << (bits - 1)) / ((1 << (bits - 1)) - 1)
    last = {2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.85}[bits]
    n_steps = 12 if bits <= 4 else 8
    return tuple(first + (last - first) * step / n_steps for step in range(n_steps + 1))


_LADDERS = {bits: _ladder(bits) for bits in range(2, 9)}


def _widest(block: Tensor, options: GridOptions) -> tuple[Tensor, Tensor]:
    """Scale and zero point per group that just reach its extremes."""
    low = block.amin(-1).clamp(max=0)
    high = block.amax(-1).clamp(min=0)
    if options.symmetric:
        scale = torch.where(-low >= high, -low, -high) / options.offset
        zero = torch.full_like(scale, options.offset)
    else:
        scale = (high - low) / (options.n_levels - 1)
        zero = torch.where(scale > 0, -low / scale, 0).round_()
    return torch.where(scale == 0, 1.0, scale), zero


class _Best:
    """The best grid found so far, per group; errors are of the float16 scale."""

    def __init__(
        self, block: Tensor, importance: Tensor, top: int, scale: Tensor, zero: Tensor
    ) -> None:
        self._block, self._importance, self._top = block, importance, top
        self._negative = -block
        self.scale = storable(scale)
        self.zero = zero.clamp(0, top)
        self._error = self._measure(self.scale, self.zero)

    def consider(self, scale: Tensor, zero: Tensor) -> None:
        """Take over scale and zero point in the groups where they measure better."""
        scale, zero = storable(scale), zero.clamp(0, self._top)
        error = self._measure(scale, zero)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def least_squares(self) -> Tensor:
        """The scale that fits the current codes best."""
        levels = self._levels(self.scale, self.zero)
        weighted = levels * self._importance
        denominator = (weighted * levels).sum(-1)
        optimum = (weighted * self._block).sum(-1) / denominator
        return torch.where(denominator > 0, optimum, self.scale)

    def _levels(self, scale: Tensor, zero: Tensor) -> Tensor:
        levels = (self._block / scale[..., None]).round_().add_(zero[..., None])
        return levels.clamp_(0, self._top).sub_(zero[..., None])

    def _measure(self, scale: Tensor, zero: Tensor) -> Tensor:
        residual = self._levels(scale, zero)
        torch.addcmul(self._negative, residual, scale[..., None], out=residual)
        return residual.square_().mul_(self._importance).sum(-1)


def least_offsets(codes: Tensor, places: Tensor) -> Tensor:
    """Smallest offsets (o, d) with which `places`, in steps of the grid, round to `codes`."""
    missing = codes - places
    return missing.sign() * (missing.abs() - NEARLY_HALF).clamp_(min=0)


def storable(scale: Tensor) -> Tensor:
    """The float16 value that will be stored, never zero, as float32."""
    size = scale.abs().clamp(_FP16_TINY, _FP16_MAX).to(torch.float16).to(torch.float32)
    return torch.where(scale < 0, -size, size)
