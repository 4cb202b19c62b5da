"""Many tokens at once on weights that a decode kernel repacked: tiles of them, made float.

``int8_tiles`` and ``int4_tiles`` read what `int8_weight` and `int4_weight` prepare, so that a layer
needs one form for one token and for many.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from autocompress.kernels.base import Kernel, Matrix, Stored, add, product_dtype, rounding
from autocompress.kernels.integer import (
    Int4Packed,
    Int4Weight,
    Int8Rows,
    int4_packed,
    int8_rows,
    refuses_int8,
    with_offsets,
)
from autocompress.methods.slices import rows_per_slice

_BLOCKS = (64, 32, 16)
_ZERO = 8


class Int8Tiles(Kernel[Int8Rows]):
    """Tiles of int8 rows; the scale of a row multiplies the result."""

    name = "int8_tiles"
    form = "int8_rows"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:
        """See `Kernel.tolerance`; integers of 8 bits are exact in every dtype."""
        product = product_dtype(dtype, device)
        return rounding(product, product, dtype)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        return refuses_int8(matrix)

    def repack(self, tensors: Stored, matrix: Matrix) -> Int8Rows:
        """See `Kernel.repack`."""
        return int8_rows(tensors, matrix)

    def held_bytes(self, state: Int8Rows) -> int:
        """See `Kernel.held_bytes`: a byte per weight, whatever was stored."""
        return state.n_bytes

    def multiply(self, rows: Tensor, state: Int8Rows) -> Tensor:
        """See `Kernel.multiply`."""
        n, columns = state.integers.shape
        rows = rows.to(product_dtype(rows.dtype, rows.device))
        found = torch.empty(len(rows), n, dtype=torch.float32, device=rows.device)
        step = rows_per_slice(columns, rows.device)
        for start in range(0, n, step):
            tile = state.integers[start : start + step].to(rows.dtype)
            found[:, start : start + step] = functional.linear(rows, tile)
        return found.mul_(state.scales)


class Int4Tiles(Kernel[Int4Packed]):
    """Tiles of the CPU's int4 layout: blocks of rows, column by column, two rows to a byte."""

    name = "int4_tiles"
    form = "int4_packed"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:
        """See `Kernel.tolerance`; scales were rounded to bfloat16."""
        product = product_dtype(dtype, device)
        return rounding(torch.bfloat16, product, product, product, dtype)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        if matrix.device.type != "cpu":
            return "the layout of int4_weight is known on CPUs only"
        reason = Int4Weight().refuses(matrix)
        if reason:
            return reason
        block = _block()
        if not block or matrix.shape[0] % block:
            return f"needs outputs in whole blocks of {block or _BLOCKS[0]}"
        return ""

    def repack(self, tensors: Stored, matrix: Matrix) -> Int4Packed:
        """See `Kernel.repack`."""
        return int4_packed(tensors, matrix)

    def held_bytes(self, state: Int4Packed) -> int:
        """See `Kernel.held_bytes`: 4 bits per weight and 4 bytes per scale."""
        return state.n_bytes

    def multiply(self, rows: Tensor, state: Int4Packed) -> Tensor:
        """See `Kernel.multiply`."""
        block, columns = _block(), rows.shape[1]
        rows = rows.to(product_dtype(rows.dtype, rows.device))
        nibbles = state.packed.view(-1, columns, block // 2)
        scales = state.scales[..., 0].view(len(state.scales), -1, block).transpose(0, 1)
        found = rows.new_empty(len(rows), len(nibbles) * block)
        step = max(1, rows_per_slice(columns, rows.device) // block)
        for start in range(0, len(nibbles), step):
            some = slice(start, start + step)
            tile = _decoded(nibbles[some], scales[some], state.group).to(rows.dtype)
            products = torch.matmul(rows, tile).transpose(0, 1).flatten(1)
            found[:, start * block : start * block + products.shape[1]] = products
        return with_offsets(found, rows.float(), state)


def _decoded(nibbles: Tensor, scales: Tensor, group: int) -> Tensor:
    """Blocks (b, d, rows of a block) float32 of nibbles (b, d, half as many), two rows to a byte.

    Scales are (b, groups, rows of a block).
    """
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float().sub_(_ZERO)
    n_blocks, _, n_rows = codes.shape
    codes.view(n_blocks, -1, group, n_rows).mul_(scales.float()[:, :, None])
    return codes


@lru_cache(maxsize=1)
def _block() -> int:
    """Rows of a block of the layout on this CPU, found by repacking numbers; 0 if it is another."""
    codes = (torch.arange(64 * 64) * 7 // 5 % 16).to(torch.uint8).view(64, 64)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    for block in _BLOCKS:
        nibbles = packed.view(-1, 64, block // 2)
        rows = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).transpose(1, 2).reshape(64, 64)
        if torch.equal(rows, codes):
            return block
    return 0


for _kernel in (Int8Tiles(), Int4Tiles()):
    add(_kernel)
