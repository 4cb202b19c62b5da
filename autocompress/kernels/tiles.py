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
from autocompress.methods.packing import unpack
from autocompress.methods.schemes import plan
from autocompress.methods.storage import MatrixStorage
from autocompress.methods.subgroup import BandCoding

_WEIGHTS_PER_TILE = 1 << 18  # 1 MiB of float32 stays in the cache
_WEIGHTS_ON_GPU = 1 << 24
_ALIGNED = 8  # so many rows of codes of any width start on a byte


@dataclass(frozen=True, eq=False)
class Slices:
    """A stored matrix that decodes by slices of rows.

    Attributes:
        storage: of the whole matrix.
        tensors: stored.
        n_rows: rows of a slice; a multiple of eight.
        starts: kept entries before each slice of a sparse matrix, and in all; else empty.
    """

    storage: MatrixStorage
    tensors: Stored
    n_rows: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, storage: MatrixStorage, tensors: Stored) -> Slices:
        """Count what a mask keeps once, slice by slice."""
        rows, columns = storage.shape
        n_rows = rows_per_tile(columns, next(iter(tensors.values())).device)
        plain = cls(storage, tensors, n_rows, ())
        if "mask" not in tensors:
            return plain
        kept = [plain._mask(start, stop).sum() for start, stop in plain.bounds()]
        starts = torch.stack(kept).cumsum(0).tolist() if rows else []
        return cls(storage, tensors, n_rows, (0, *starts))

    def bounds(self) -> list[tuple[int, int]]:
        """(first row, row after the last) of each slice."""
        n = self.storage.shape[0]
        return [(start, min(start + self.n_rows, n)) for start in range(0, n, self.n_rows)]

    def decoded(self, index: int) -> Tensor:
        """Slice `index` (rows, d): plain values in their dtype, else float32."""
        start, stop = self.bounds()[index]
        if not self.starts:
            return self._dense(start, stop)
        mask = self._mask(start, stop)
        entries = self._kept(self.starts[index], self.starts[index + 1])
        places = mask.view(-1).cumsum(0, dtype=torch.int32).sub_(1).clamp_(min=0)
        if not len(entries):
            return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        spread = entries.index_select(0, places).view(mask.shape)
        values = self._values(spread, start, stop)
        return values * mask.to(values.dtype)

    def _dense(self, start: int, stop: int) -> Tensor:
        coding = self.storage.coding
        if coding is None:
            return self.tensors["values"][start:stop]
        if isinstance(coding, BandCoding):  # its rows do not lie one after another
            rows = torch.arange(start, stop, device=self.tensors["packed"].device)
            return self.storage.decode_rows(self.tensors, rows)
        width = coding.codes_per_row(self.storage.shape[1])
        codes = self._codes(start * width, stop * width)
        return self._values(codes.view(stop - start, width), start, stop)

    def _kept(self, start: int, stop: int) -> Tensor:
        """Kept entries `start` to `stop` of a sparse matrix."""
        if self.storage.coding is None:
            return self.tensors["values"][start:stop]
        aligned = start // _ALIGNED * _ALIGNED
        return self._codes(aligned, stop)[start - aligned :]

    def _codes(self, start: int, stop: int) -> Tensor:
        """Codes `start` to `stop` in storage order; `start` is a multiple of eight."""
        coding, shape = self.storage.coding, self.storage.shape
        assert coding is not None  # callers have checked
        first, last = (coding.code_bytes(shape, n) for n in (start, stop))
        return coding.unpack(self.tensors["packed"][first:last], shape, stop - start)

    def _values(self, codes: Tensor, start: int, stop: int) -> Tensor:
        coding, shape = self.storage.coding, self.storage.shape
        if coding is None:
            return codes
        rows = torch.arange(start, stop, device=codes.device)
        return coding.values(codes, self.storage.parameters(self.tensors), shape, rows)

    def _mask(self, start: int, stop: int) -> Tensor:
        columns = self.storage.shape[1]
        n = (stop - start) * columns
        first = start * columns // 8
        bits = unpack(self.tensors["mask"][first : first + -(-n // 8)], 1, n)
        return bits.view(torch.bool).view(stop - start, columns)


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
        for index, (start, stop) in enumerate(state.slices.bounds()):
            tile = state.slices.decoded(index).to(state.dtype)
            found[:, start:stop] = functional.linear(rows, tile)
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


def rows_per_tile(columns: int, device: torch.device) -> int:
    """Rows of `columns` weights to decode at once, a multiple of eight."""
    wanted = (_WEIGHTS_PER_TILE if device.type == "cpu" else _WEIGHTS_ON_GPU) // columns
    return max(_ALIGNED, wanted // _ALIGNED * _ALIGNED)


def in_basis(tensors: Stored, matrix: Matrix) -> Tensor:
    """The dense matrix of the stages after the transform, in the compute dtype."""
    scheme = matrix.plan.scheme
    if matrix.plan.transform is not None:
        scheme = type(scheme)(scheme.stages[1:])
    return decode(tensors, plan(scheme).scheme, matrix.shape, matrix.dtype).to(matrix.device)


for _kernel in (Tiles(), Reference(), Dense()):
    add(_kernel)
