"""Decode a tile of rows, multiply, drop it: any scheme, bounded memory, never the whole matrix.

Also the two plain ways beside it: `reference` decodes the whole layer on every call, bit for bit as
the search measured it; `dense` decodes it once and keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from autocompress.methods.compress import decode
from autocompress.methods.schemes import plan
from autocompress.methods.slices import Slices


@dataclass(frozen=True, eq=False)
class Tiled:
    """Slices, and what they are multiplied in."""

    slices: Slices
    dtype: torch.dtype


class Tiles(Kernel[Tiled]):
    """Tile-wise decoding; plain values are multiplied as they are."""

    name = "tiles"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:
        """See `Kernel.tolerance`: inputs and weights are rounded to what is multiplied in."""
        product = product_dtype(dtype, device)
        return rounding(product, product, product, dtype)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        if matrix.plan.factorize is not None:
            return "the layer is two factors: low_rank multiplies by each"
        return ""

    def repack(self, tensors: Stored, matrix: Matrix) -> Tiled:
        """See `Kernel.repack`; holds nothing of its own."""
        slices = Slices.of(matrix.storage, tensors)
        return Tiled(slices, product_dtype(matrix.dtype, matrix.device))

    def multiply(self, rows: Tensor, state: Tiled) -> Tensor:
        """See `Kernel.multiply`."""
        rows = rows.to(state.dtype)
        values = state.slices.tensors.get("values")
        if values is not None and not state.slices.starts and values.dtype == state.dtype:
            return functional.linear(rows, values)
        found = rows.new_empty(len(rows), state.slices.storage.shape[0])
        for part, values in state.slices:
            found[:, part] = functional.linear(rows, values.to(state.dtype))
        return found


class Reference(Kernel[tuple[Stored, Matrix]]):
    """Decode the whole layer, multiply, drop it: what the search measured."""

    name = "reference"
    chosen = False
    takes_residuals = True

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:  # noqa: ARG002
        """See `Kernel.tolerance`: the weight is rounded to the compute dtype."""
        return rounding(dtype, dtype, dtype)

    def refuses(self, matrix: Matrix) -> str:  # noqa: ARG002
        """See `Kernel.refuses`; it takes all."""
        return ""

    def repack(self, tensors: Stored, matrix: Matrix) -> tuple[Stored, Matrix]:
        """See `Kernel.repack`; holds nothing of its own."""
        return tensors, matrix

    def multiply(self, rows: Tensor, state: tuple[Stored, Matrix]) -> Tensor:
        """See `Kernel.multiply`."""
        tensors, matrix = state
        return functional.linear(rows.to(matrix.dtype), in_basis(tensors, matrix))


class Dense(Kernel[Tensor]):
    """Decode once and keep: as fast and as large as the base model's layer."""

    name = "dense"
    form = "dense"
    chosen = False
    takes_residuals = True

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:  # noqa: ARG002
        """See `Kernel.tolerance`."""
        return rounding(dtype, dtype, dtype)

    def refuses(self, matrix: Matrix) -> str:  # noqa: ARG002
        """See `Kernel.refuses`; it takes all."""
        return ""

    def repack(self, tensors: Stored, matrix: Matrix) -> Tensor:
        """See `Kernel.repack`."""
        return in_basis(tensors, matrix)

    def held_bytes(self, state: Tensor) -> int:
        """See `Kernel.held_bytes`: the whole matrix."""
        return tensor_bytes(state)

    def multiply(self, rows: Tensor, state: Tensor) -> Tensor:
        """See `Kernel.multiply`."""
        return functional.linear(rows.to(state.dtype), state)


def in_basis(tensors: Stored, matrix: Matrix) -> Tensor:
    """The dense matrix of the stages after the transform, in the compute dtype."""
    scheme = matrix.plan.scheme
    if matrix.plan.transform is not None:
        scheme = type(scheme)(scheme.stages[1:])
    return decode(tensors, plan(scheme).scheme, matrix.shape, matrix.dtype).to(matrix.device)


for _kernel in (Tiles(), Reference(), Dense()):
    add(_kernel)
