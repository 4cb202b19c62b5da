"""How one matrix lies in a file: which tensors, decided from its shape alone.

``values`` holds plain numbers in the base dtype; ``packed``, ``scales`` and ``zeros`` hold
integers on a grid. A sparse matrix stores a bit ``mask`` and its kept entries only, in row order,
if that is smaller than storing the zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.footprint import TensorLayout
from autocompress.core.layer import DTYPE_BYTES
from autocompress.methods.grid import Grid, GridOptions, Quantized
from autocompress.methods.packing import pack, packed_bytes, unpack


@dataclass(frozen=True, slots=True)
class MatrixStorage:
    """Storage of an (o, d) matrix.

    Attributes:
        shape: (o, d).
        grid: of a quantized matrix; None: plain values.
        n_kept: kept entries of a sparse matrix; None: dense.
    """

    shape: tuple[int, int]
    grid: GridOptions | None
    n_kept: int | None

    @property
    def n_entries(self) -> int:
        """Entries of the matrix."""
        return self.shape[0] * self.shape[1]

    def layout(self, dtype: str) -> dict[str, TensorLayout]:
        """Shapes and dtypes of the stored tensors; `dtype` is that of plain values."""
        n = self.n_stored(dtype)
        layout = {}
        if n < self.n_entries:
            layout["mask"] = TensorLayout((packed_bytes(self.n_entries, 1),), "uint8")
        if self.grid is None:
            layout["values"] = TensorLayout(self.shape if n == self.n_entries else (n,), dtype)
            return layout
        scales = (self.shape[0], self.grid.n_groups(self.shape[1]))
        layout["packed"] = TensorLayout((packed_bytes(n, self.grid.bits),), "uint8")
        layout["scales"] = TensorLayout(scales, "float16")
        if not self.grid.symmetric:
            n_bytes = packed_bytes(scales[0] * scales[1], self.grid.bits)
            layout["zeros"] = TensorLayout((n_bytes,), "uint8")
        return layout

    def n_stored(self, dtype: str) -> int:
        """Entries that are stored: the kept ones if a mask pays, else all."""
        if self.n_kept is None:
            return self.n_entries

        def size(n: int) -> int:
            return packed_bytes(n, self.grid.bits) if self.grid else n * DTYPE_BYTES[dtype]

        with_mask = packed_bytes(self.n_entries, 1) + size(self.n_kept)
        return self.n_kept if with_mask < size(self.n_entries) else self.n_entries

    def encode(
        self, content: Tensor | Quantized, mask: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The stored tensors of a matrix; those that `layout` announces.

        Args:
            content: values (o, d), zero where `mask` is False, or codes on a grid.
            mask: (o, d) bool, True where the entry is kept.
            dtype: of plain values.
        """
        entries = content.codes if isinstance(content, Quantized) else content.to(dtype)
        tensors = {}
        if mask is not None and self.n_stored(_name(dtype)) < self.n_entries:
            tensors["mask"] = pack(mask.view(torch.uint8), 1)
            entries = entries[mask]
        if not isinstance(content, Quantized):
            return {**tensors, "values": entries.clone(memory_format=torch.contiguous_format)}
        grid = content.grid
        tensors["packed"] = pack(entries, grid.options.bits)
        tensors["scales"] = grid.scales
        if grid.zeros is not None:
            tensors["zeros"] = pack(grid.zeros, grid.options.bits)
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        """The matrix (o, d): plain values in their dtype, quantized ones in float32."""
        mask = self._mask(tensors, prefix)
        if self.grid is None:
            return self._spread(tensors[f"{prefix}values"], mask)
        n = self.n_entries if mask is None or self.n_kept is None else self.n_kept
        codes = self._spread(unpack(tensors[f"{prefix}packed"], self.grid.bits, n), mask)
        dense = self._grid(tensors, prefix).dense(codes)
        return dense if mask is None else dense.mul_(mask.to(dense.dtype))

    def decode_rows(self, tensors: Mapping[str, Tensor], rows: Tensor, prefix: str = "") -> Tensor:
        """Rows of the matrix, (len(rows), d); reads them alone where they start on a byte."""
        d = self.shape[1]
        if f"{prefix}mask" in tensors or (self.grid is not None and d % 8):
            return self.decode(tensors, prefix)[rows]
        if self.grid is None:
            return tensors[f"{prefix}values"][rows]
        packed = tensors[f"{prefix}packed"].view(self.shape[0], -1)[rows].reshape(-1)
        codes = unpack(packed, self.grid.bits, len(rows) * d).view(-1, d)
        whole = self._grid(tensors, prefix)
        zeros = None if whole.zeros is None else whole.zeros[rows]
        return Grid(self.grid, whole.scales[rows], zeros).dense(codes)

    def _grid(self, tensors: Mapping[str, Tensor], prefix: str) -> Grid:
        assert self.grid is not None  # callers have checked
        scales, zeros = tensors[f"{prefix}scales"], None
        if not self.grid.symmetric:
            zeros = unpack(tensors[f"{prefix}zeros"], self.grid.bits, scales.numel())
            zeros = zeros.view(scales.shape)
        return Grid(self.grid, scales, zeros)

    def _mask(self, tensors: Mapping[str, Tensor], prefix: str) -> Tensor | None:
        if f"{prefix}mask" not in tensors:
            return None
        bits = unpack(tensors[f"{prefix}mask"], 1, self.n_entries)
        return bits.view(torch.bool).view(self.shape)

    def _spread(self, entries: Tensor, mask: Tensor | None) -> Tensor:
        """Stored entries at their places in the matrix, zeros elsewhere.

        A running count of the mask is each entry's place in `entries`. That, and products with
        the mask instead of fills, is several times faster than torch's masked operations on CPUs.
        """
        if mask is None:
            return entries.view(self.shape)
        index = torch.int32 if self.n_entries < 2**31 else torch.int64
        places = mask.view(-1).cumsum(0, dtype=index).sub_(1).clamp_(min=0)
        spread = entries.index_select(0, places)
        return spread.mul_(mask.view(-1).to(entries.dtype)).view(self.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
