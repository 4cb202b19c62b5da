"""How one matrix lies in a file: which tensors, decided from its shape alone.

``values`` holds plain numbers in the base dtype; ``packed`` holds codes, and beside it lies what
gives them their meaning: scales, zero points, codebooks. A sparse matrix stores a bit ``mask`` and
its kept entries only, in row order, if that is smaller than storing the zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autocompress.core.errors import ModelError
from autocompress.core.footprint import TensorLayout
from autocompress.core.layer import DTYPE_BYTES
from autocompress.methods.coding import Coding, Damage, Quantized, Stored
from autocompress.methods.packing import pack, packed_bytes, unpack

_PACKED, _MASK, _VALUES = "packed", "mask", "values"
WIDTH, TRANSFORM, RESIDUAL = "w.", "t.", "r."
"""Prefixes of what those stages store."""


@dataclass(frozen=True, slots=True)
class MatrixStorage:
    """Storage of an (o, d) matrix.

    Attributes:
        shape: (o, d).
        coding: of a quantized matrix; None: plain values.
        n_kept: kept entries of a sparse matrix; None: dense.
    """

    shape: tuple[int, int]
    coding: Coding | None
    n_kept: int | None

    @property
    def n_entries(self) -> int:
        """Entries of the matrix."""
        return self.shape[0] * self.shape[1]

    def layout(self, dtype: str) -> dict[str, TensorLayout]:
        """Shapes and dtypes of the stored tensors; `dtype` is that of plain values."""
        n = self.n_stored(dtype)
        layout = {}
        if n is not None:
            layout[_MASK] = TensorLayout((packed_bytes(self.n_entries, 1),), "uint8")
        if self.coding is None:
            layout[_VALUES] = TensorLayout(self.shape if n is None else (n,), dtype)
            return layout
        if not self.coding.stores_codes:
            return {}
        layout[_PACKED] = TensorLayout((self.coding.code_bytes(self.shape, n),), "uint8")
        return layout | self.coding.parameters(self.shape)

    def n_stored(self, dtype: str) -> int | None:
        """The number of kept entries if only they are stored, beside a mask; None: all are.

        A mask pays unless the zeros are cheaper.
        """
        if self.n_kept is None:
            return None

        def size(n: int | None) -> int:
            if self.coding is not None:
                return self.coding.code_bytes(self.shape, n)
            return (self.n_entries if n is None else n) * DTYPE_BYTES[dtype]

        with_mask = packed_bytes(self.n_entries, 1) + size(self.n_kept)
        return self.n_kept if with_mask < size(None) else None

    def encode(
        self, content: Tensor | Quantized, mask: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The stored tensors of a matrix; those that `layout` announces.

        Args:
            content: values (o, d), zero where `mask` is False, or codes.
            mask: (o, d) bool, True where the entry is kept.
            dtype: of plain values.
        """
        entries = content.codes if isinstance(content, Quantized) else content.to(dtype)
        tensors = {}
        if mask is not None and self.n_stored(_name(dtype)) is not None:
            tensors[_MASK] = pack(mask.view(torch.uint8), 1)
            entries = entries[mask]
        if not isinstance(content, Quantized):
            return {**tensors, _VALUES: entries.clone(memory_format=torch.contiguous_format)}
        assert self.coding is not None  # only quantizers make codes
        if not self.coding.stores_codes:
            return {}
        return {**tensors, _PACKED: self.coding.pack(entries), **content.parameters}

    def decode(self, tensors: Stored, prefix: str = "") -> Tensor:
        """The matrix (o, d): plain values in their dtype, quantized ones in float32."""
        if self.coding is None:
            return self._spread(tensors[f"{prefix}{_VALUES}"], self._mask(tensors, prefix))
        codes, mask = self.codes(tensors, prefix)
        dense = self.coding.values(codes, self.parameters(tensors, prefix), self.shape)
        return dense if mask is None else dense.mul_(mask.to(dense.dtype))

    def codes(self, tensors: Stored, prefix: str = "") -> tuple[Tensor, Tensor | None]:
        """Codes of a quantized matrix and, if zeros are not stored, its mask (o, d).

        A code where the mask is False means nothing.
        """
        assert self.coding is not None  # callers have checked
        if not self.coding.stores_codes:
            return torch.empty(0, dtype=torch.uint8), None
        mask = self._mask(tensors, prefix)
        n = None if mask is None else self.n_kept
        codes = self.coding.unpack(tensors[f"{prefix}{_PACKED}"], self.shape, n)
        return (codes if mask is None else self._spread(codes, mask)), mask

    def decode_rows(self, tensors: Stored, rows: Tensor, prefix: str = "") -> Tensor:
        """Rows of the matrix, (len(rows), d); reads them alone where they start on a byte."""
        if f"{prefix}{_MASK}" in tensors:
            return self.decode(tensors, prefix)[rows]
        if self.coding is None:
            return tensors[f"{prefix}{_VALUES}"][rows]
        codes = torch.empty(0, dtype=torch.uint8)
        if self.coding.stores_codes:
            codes = self.coding.unpack_rows(tensors[f"{prefix}{_PACKED}"], self.shape, rows)
        return self.coding.values(codes, self.parameters(tensors, prefix), self.shape, rows)

    def parameters(self, tensors: Stored, prefix: str = "") -> dict[str, Tensor]:
        """What the codes of a quantized matrix mean, as stored."""
        assert self.coding is not None  # callers have checked
        return {name: tensors[f"{prefix}{name}"] for name in self.coding.parameters(self.shape)}

    def damage(self, tensors: Stored) -> Damage | None:
        """The first stored tensor, no prefix, that no compression writes; floats are finite."""
        masked = _MASK in tensors
        if masked:
            mask = tensors[_MASK].cpu().numpy()
            n_ones = int(np.unpackbits(mask, count=self.n_entries, bitorder="little").sum())
            if n_ones != self.n_kept:
                return Damage(_MASK, self._wrong_mask(n_ones))
        if self.coding is None or _PACKED not in tensors:
            return None
        return self.coding.damage(tensors, self.shape, self.n_kept if masked else None)

    def _mask(self, tensors: Stored, prefix: str) -> Tensor | None:
        if f"{prefix}{_MASK}" not in tensors:
            return None
        bits = unpack(tensors[f"{prefix}{_MASK}"], 1, self.n_entries)
        mask = bits.view(torch.bool).view(self.shape)
        self.require_kept(int(mask.sum()))
        return mask

    def require_kept(self, n_ones: int) -> None:
        """Make sure that a stored mask has as many ones as the scheme keeps.

        Raises:
            ModelError: it has another number.
        """
        if n_ones != self.n_kept:
            raise ModelError(
                f"A mask of this layer {self._wrong_mask(n_ones)}: the file is damaged. Next step: "
                "export it again."
            )

    def _wrong_mask(self, n_ones: int) -> str:
        return f"must keep {self.n_kept} of {self.n_entries} weights, but keeps {n_ones}"

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


def under(prefix: str, tensors: Stored) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, by the rest of it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
