"""Integer grids multiplied as they are stored, by C that is compiled here.

``native`` multiplies few tokens by the packed codes themselves; nothing is repacked, so nothing is
held beside the file. ``native_tiles`` decodes slices of rows for a dense product, for many tokens;
``native_panels`` decodes them into the caches for a product of its own, with AVX-512 BF16.
Inputs, sums and scales are float32; entries are exactly those that the reference decodes, rounded
where the product is in bfloat16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from autocompress.kernels.base import (
    Kernel,
    Matrix,
    Stored,
    add,
    product_dtype,
    rounding,
    tensor_bytes,
)
from autocompress.kernels.integer import grid_options
from autocompress.methods.packing import unpack
from autocompress.native.build import has_panels, library, missing

_CHUNK = 8  # codes that the C reads at a time
_WEIGHTS_PER_TILE = 1 << 20  # of float32 that lie beside the file for a moment


@dataclass(frozen=True, eq=False)
class StoredGrid:
    """A matrix as it is stored.

    Attributes:
        codes: packed, uint8.
        scales: (o, G) float16.
        zeros: (o, G) uint8; None if all are half of the codes.
        shape: (o, d).
        width: columns of a group.
        bits: of a code.
        dtype: that dense products of it are in.
        functions: the C.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    width: int
    bits: int
    dtype: torch.dtype
    functions: ctypes.CDLL

    @cached_property
    def described(self) -> tuple[int, ...]:
        """What the C takes of it: where it lies, shape, width and bits."""
        zeros = 0 if self.zeros is None else self.zeros.data_ptr()
        places = self.codes.data_ptr(), self.scales.data_ptr(), zeros
        return *places, *self.shape, self.width, self.bits


class _Native(Kernel[StoredGrid]):
    form = "native"
    reads_stored = True

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        options, d = grid_options(matrix), matrix.shape[1]
        if matrix.device.type != "cpu":
            return f"runs on CPUs, but got {matrix.device.type}"
        if options is None:
            return "the weights are not integers on a grid"
        if matrix.storage.n_stored("float32") is not None:
            return "the zeros are not stored"
        if d % _CHUNK or options.width(d) % _CHUNK:
            return f"needs multiples of {_CHUNK} inputs and weights of a group"
        return missing()

    def repack(self, tensors: Stored, matrix: Matrix) -> StoredGrid:
        """See `Kernel.repack`: nothing moves but the zero points, to a byte each."""
        options, d = grid_options(matrix), matrix.shape[1]
        assert options is not None  # refuses has checked
        scales = tensors["scales"].contiguous()
        zeros = None
        if not options.symmetric:
            zeros = unpack(tensors["zeros"], options.bits, scales.numel()).contiguous()
        return StoredGrid(
            tensors["packed"].contiguous(), scales, zeros, matrix.shape,
            options.width(d), options.bits, product_dtype(matrix.dtype, matrix.device), library(),
        )  # fmt: skip

    def held_bytes(self, state: StoredGrid) -> int:
        """See `Kernel.held_bytes`: the zero points, unpacked."""
        return 0 if state.zeros is None else tensor_bytes(state.zeros)


class Native(_Native):
    """Codes are unpacked in registers, next to the inputs that they multiply."""

    name = "native"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:  # noqa: ARG002
        """See `Kernel.tolerance`: outputs are rounded to `dtype`."""
        return rounding(torch.float32, dtype)

    def multiply(self, rows: Tensor, state: StoredGrid) -> Tensor:
        """See `Kernel.multiply`."""
        return _product(state.functions.grid_product, rows, state)


class NativeTiles(_Native):
    """Slices of rows are decoded into one buffer and multiplied by a dense product."""

    name = "native_tiles"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:
        """See `Kernel.tolerance`: inputs and weights are rounded to what is multiplied in."""
        product = product_dtype(dtype, device)
        return rounding(product, product, product, dtype)

    def multiply(self, rows: Tensor, state: StoredGrid) -> Tensor:
        """See `Kernel.multiply`."""
        rows, (o, d) = rows.to(state.dtype), state.shape
        size = min(o, max(1, _WEIGHTS_PER_TILE // d))
        tile = torch.empty(size, d)
        found = rows.new_empty(len(rows), o)
        for start in range(0, o, size):
            stop = min(start + size, o)
            state.functions.grid_values(
                *state.described, start, stop, tile.data_ptr(), torch.get_num_threads()
            )
            values = tile[: stop - start].to(state.dtype)
            found[:, start:stop] = functional.linear(rows, values)
        return found


class NativePanels(_Native):
    """Tiles of rows are decoded to bfloat16 once and meet all tokens while they are in a cache."""

    name = "native_panels"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:  # noqa: ARG002
        """See `Kernel.tolerance`: inputs and weights are rounded to bfloat16, sums are float32."""
        return rounding(torch.bfloat16, torch.bfloat16, dtype)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        reason = super().refuses(matrix)
        if reason:
            return reason
        if matrix.dtype == torch.float16:
            return "multiplies in bfloat16, which is coarser than float16"
        return "" if has_panels(library()) else "needs a CPU with AVX-512 BF16"

    def multiply(self, rows: Tensor, state: StoredGrid) -> Tensor:
        """See `Kernel.multiply`."""
        return _product(state.functions.grid_panels, rows, state)


def _product(function: Callable[..., int], rows: Tensor, state: StoredGrid) -> Tensor:
    """Rows (n, d) to (n, o) float32, by C that takes float32."""
    rows = rows.float().contiguous()
    n = len(rows)
    found = rows.new_empty(n, state.shape[0])
    if function(*state.described, rows.data_ptr(), n, found.data_ptr(), torch.get_num_threads()):
        raise MemoryError(f"There is no memory for a product of {n} tokens.")
    return found


for _kernel in (Native(), NativeTiles(), NativePanels()):
    add(_kernel)
