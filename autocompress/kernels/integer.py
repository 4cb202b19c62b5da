"""Weights that stay integers while they are multiplied.

``int8_weight`` and ``int4_weight`` multiply float inputs by integer weights (``aten``'s
``_weight_int8pack_mm`` and ``_weight_int4pack_mm``). They read bfloat16 only: other inputs are
rounded to it, which is what their tolerance says. Scales are kept exact where the operator would
round them to bfloat16: a scale per row multiplies the result instead.

A zero point would be rounded too: the int4 operator adds ``zero`` in bfloat16. It is given none;
codes are shifted so that zero is as near to 8 as can be, the code that it takes for zero, and what
is left, ``sum_j (8 - z) s x_j`` over each group, is a thin product of group sums in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autocompress.kernels.base import (
    Kernel,
    Matrix,
    Stored,
    add,
    has_operator,
    rounding,
    tensor_bytes,
)
from autocompress.kernels.paging import page_out
from autocompress.methods.grid import GridCoding, GridOptions
from autocompress.methods.packing import unpack
from autocompress.methods.slices import Slices

INT8_ROWS, INT8_COLUMNS = 16, 32
_INT4_GROUPS = (256, 128, 64, 32)
_INT4_ZERO = 8  # code that the operator takes for zero
_INT4_LEVELS = 16
_LAYOUT_ROWS = 64  # so many of the int4 layout lie together, whatever the device
_SLICES_PER_PAGE_OUT = 32
_INNER_TILES = 8  # of the CUDA layout: columns come in multiples of 16 times this


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """Integers (o, d) int8 and a scale per row (o,) float32: ``W = diag(scales) integers``."""

    integers: Tensor
    scales: Tensor

    @property
    def n_bytes(self) -> int:
        """Memory that it holds."""
        return tensor_bytes(self.integers, self.scales)


def grid_options(matrix: Matrix) -> GridOptions | None:
    """Options of an integer grid; None if the matrix is not on one, or is two factors."""
    coding = matrix.plan.coding
    if matrix.plan.factorize is not None or not isinstance(coding, GridCoding):
        return None
    return coding.options


def refuses_int8(matrix: Matrix) -> str:
    """Why a matrix is not `Int8Rows`; empty if it is."""
    options = grid_options(matrix)
    if options is None:
        return "the weights are not integers on a grid"
    if options.n_groups(matrix.shape[1]) > 1:
        return f"needs one scale per row, but groups have {options.group_size} weights"
    if not options.symmetric and options.bits == 8:
        return "8-bit codes with a zero point do not fit int8"
    return ""


def int8_rows(tensors: Stored, matrix: Matrix) -> Int8Rows:
    """A matrix of one scale per row."""
    integers, scales = int8_by_group(tensors, matrix)
    return Int8Rows(integers[0], scales[0])


def int8_by_group(tensors: Stored, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Codes less their zero point, (groups, o, width) int8, and scales, (groups, o) float32."""
    options, scales = grid_options(matrix), tensors["scales"]
    assert options is not None  # refuses_int8 has checked
    zeros = torch.full_like(scales, options.offset, dtype=torch.uint8)
    if not options.symmetric:
        zeros = unpack(tensors["zeros"], options.bits, scales.numel()).view(scales.shape)
    (o, d), n_groups = matrix.shape, scales.shape[1]
    found = torch.empty(n_groups, o, d // n_groups, dtype=torch.int8, device=scales.device)
    for rows, codes, mask in slices_read_once(tensors, matrix):
        # Differences fit int8, so wrapping around in uint8 arithmetic is exact.
        integers = codes.view(len(codes), n_groups, -1).sub(zeros[rows, :, None])
        if mask is not None:
            integers.mul_(mask.view(integers.shape))
        found[:, rows] = integers.view(torch.int8).transpose(0, 1)
    return found, scales.float().t().contiguous()


def slices_read_once(
    tensors: Stored, matrix: Matrix
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Rows, codes and mask, slice by slice; pages of the file go back as they have been read."""
    slices = Slices.of(matrix.storage, tensors, _LAYOUT_ROWS)
    for number, part in enumerate(slices.coded(), start=1):
        yield part
        if number % _SLICES_PER_PAGE_OUT == 0:
            page_out(tensors.values())


class Int8Weight(Kernel[Int8Rows]):
    """``_weight_int8pack_mm``: weights of up to 8 bits, one scale per row."""

    name = "int8_weight"
    form = "int8_rows"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:  # noqa: ARG002
        """See `Kernel.tolerance`: inputs and outputs are rounded to bfloat16."""
        return rounding(torch.bfloat16, torch.bfloat16, dtype)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        if not has_operator("_weight_int8pack_mm", matrix.device):
            return f"torch has no _weight_int8pack_mm on {matrix.device.type}"
        o, d = matrix.shape
        if o % INT8_ROWS or d % INT8_COLUMNS:  # it reads beyond the end of others, unchecked
            return f"needs multiples of {INT8_ROWS} outputs and {INT8_COLUMNS} inputs: {o} x {d}"
        return refuses_int8(matrix)

    def repack(self, tensors: Stored, matrix: Matrix) -> Int8Rows:
        """See `Kernel.repack`."""
        return int8_rows(tensors, matrix)

    def held_bytes(self, state: Int8Rows) -> int:
        """See `Kernel.held_bytes`: a byte per weight, whatever was stored."""
        return state.n_bytes

    def multiply(self, rows: Tensor, state: Int8Rows) -> Tensor:
        """See `Kernel.multiply`."""
        ones = torch.ones_like(state.scales, dtype=torch.bfloat16)
        narrow = rows.to(torch.bfloat16).contiguous()
        sums: Tensor = torch.ops.aten._weight_int8pack_mm(narrow, state.integers, ones)
        return sums.float() * state.scales


@dataclass(frozen=True, eq=False)
class Int4Packed:
    """A matrix in the layout of the int4 operator.

    Attributes:
        packed: codes, 4 bits each.
        scales: (d / group, o, 2) bfloat16; the second of each pair, the operator's zero, is 0.
        offsets: (o, groups) float32, ``(8 - z) s``; None where z is always 8.
        group: weights that share a scale, as the operator is told.
        width: weights that share a zero point.
    """

    packed: Tensor
    scales: Tensor
    offsets: Tensor | None
    group: int
    width: int

    @property
    def n_bytes(self) -> int:
        """Memory that it holds."""
        offsets = () if self.offsets is None else (self.offsets,)
        return tensor_bytes(self.packed, self.scales, *offsets)


class Int4Weight(Kernel[Int4Packed]):
    """``_weight_int4pack_mm``: weights of up to 4 bits in groups of 32, 64, 128 or 256."""

    name = "int4_weight"
    form = "int4_packed"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:
        """See `Kernel.tolerance`: inputs, scales and outputs are rounded to bfloat16.

        On a GPU so is each weight, and with a zero point the outputs are larger than the sums.
        """
        weights = () if device.type == "cpu" else (torch.bfloat16,)
        return rounding(torch.bfloat16, torch.bfloat16, torch.bfloat16, dtype, *weights)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        if not has_operator(_int4_operator(matrix.device), matrix.device):
            return f"torch has no {_int4_operator(matrix.device)} on {matrix.device.type}"
        options = grid_options(matrix)
        if options is None:
            return "the weights are not integers on a grid"
        if options.bits > 4:
            return f"needs at most 4 bits, but codes have {options.bits}"
        return _refuses_int4_shape(matrix, options)

    def repack(self, tensors: Stored, matrix: Matrix) -> Int4Packed:
        """See `Kernel.repack`."""
        return int4_packed(tensors, matrix)

    def held_bytes(self, state: Int4Packed) -> int:
        """See `Kernel.held_bytes`: 4 bits per weight and 4 bytes per scale."""
        return state.n_bytes

    def multiply(self, rows: Tensor, state: Int4Packed) -> Tensor:
        """See `Kernel.multiply`."""
        narrow = rows.to(torch.bfloat16).contiguous()
        operator = getattr(torch.ops.aten, _int4_operator(rows.device))
        found: Tensor = operator(narrow, state.packed, state.group, state.scales)
        return with_offsets(found, narrow.float(), state)


def int4_packed(tensors: Stored, matrix: Matrix) -> Int4Packed:
    """A stored matrix in the layout of the int4 operator of its device."""
    options = grid_options(matrix)
    assert options is not None  # refuses has checked
    coding, parameters = GridCoding(options), matrix.storage.parameters(tensors)
    width = options.width(matrix.shape[1])
    group = _operator_group(width)
    scales = tensors["scales"].to(torch.bfloat16)
    # Memory for the results first: pieces left among temporaries would keep the heap from shrinking
    layout = tensors["packed"].new_empty(0)
    needed = options.bits == 4 and not options.symmetric
    offsets = torch.empty_like(scales, dtype=torch.float32) if needed else None
    for rows, codes, mask in slices_read_once(tensors, matrix):
        grid = coding.grid(parameters, torch.arange(rows.start, rows.stop, device=codes.device))
        zeros = grid.float_zeros.to(torch.int16).expand(grid.scales.shape)
        shifted, zeros = _centred(codes, mask, zeros)
        if offsets is not None:
            offsets[rows] = (_INT4_ZERO - zeros) * scales[rows].float()
        part = _int4_layout(shifted)
        per = len(codes) // len(part)  # rows of the matrix to one of the layout
        if not layout.numel():
            layout = part.new_empty(matrix.shape[0] // per, *part.shape[1:])
        layout[rows.start // per : rows.stop // per] = part
    shared = scales.repeat_interleave(width // group, dim=1).t()
    pairs = torch.stack([shared, torch.zeros_like(shared)], dim=-1).contiguous()
    return Int4Packed(layout, pairs, offsets, group, width)


def with_offsets(products: Tensor, rows: Tensor, state: Int4Packed) -> Tensor:
    """Products (n, o) by codes less 8, and what the zero points add to them; rows are float32."""
    if state.offsets is None:
        return products
    sums = rows.view(len(rows), -1, state.width).sum(-1)
    return functional.linear(sums, state.offsets).add_(products)


def _int4_operator(device: torch.device) -> str:
    return "_weight_int4pack_mm_for_cpu" if device.type == "cpu" else "_weight_int4pack_mm"


def _refuses_int4_shape(matrix: Matrix, options: GridOptions) -> str:
    o, d = matrix.shape
    width = options.width(d)
    if d % width or not _operator_group(width):
        return f"needs whole groups of a multiple of {_INT4_GROUPS[-1]}, but got {width} of {d}"
    rows, columns = (16, 2) if matrix.device.type == "cpu" else (8, 16 * _INNER_TILES)
    if o % rows or d % columns:
        return f"needs multiples of {rows} outputs and {columns} inputs, but got {o} x {d}"
    return ""


def _operator_group(width: int) -> int:
    """The widest group of the operator that divides `width`; 0 if there is none."""
    return next((group for group in _INT4_GROUPS if width % group == 0), 0)


def _centred(codes: Tensor, mask: Tensor | None, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (o, d) shifted group by group, and their zero points (o, groups), as near 8 as can be.

    Codes of fewer than 4 bits, symmetric ones and those of a pruned group all reach 8: the operator
    then adds nothing that has to be taken back. Pruned entries become the zero point.
    """
    grouped = codes.view(*zeros.shape, -1).to(torch.int16)
    if mask is not None:
        grouped = torch.where(mask.view(grouped.shape), grouped, zeros[..., None])
    highest = _INT4_LEVELS - 1 - grouped.amax(-1)
    shift = (_INT4_ZERO - zeros).maximum(-grouped.amin(-1)).minimum(highest)
    shifted = (grouped + shift[..., None]).to(torch.uint8)
    return shifted.view(codes.shape), zeros + shift


def _int4_layout(codes: Tensor) -> Tensor:
    """Codes (o, d) uint8 below 16 as the operator of their device wants them."""
    if codes.device.type == "cpu":
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return packed
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    found: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_TILES)
    return found


for _kernel in (Int8Weight(), Int4Weight()):
    add(_kernel)
