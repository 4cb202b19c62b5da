"""How a quantized matrix is coded: what a code means, and what the file holds beside the codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.core.footprint import TensorLayout
from autocompress.methods.packing import pack, packed_bytes, unpack

Stored = Mapping[str, Tensor]
"""Tensors as a file holds them, by name."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A stored tensor that no compression writes.

    Attributes:
        tensor: its name within the layer.
        reason: the rule and what was got: ``must be finite, but holds NaN or infinity``.
    """

    tensor: str
    reason: str

    def under(self, prefix: str) -> Damage:
        """The same of a tensor with a longer name."""
        return Damage(f"{prefix}{self.tensor}", self.reason)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are, without a copy."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


@dataclass(frozen=True, eq=False)
class Quantized:
    """What a quantizer returns.

    Attributes:
        codes: (o, codes per row) uint8, or what else `Coding.pack` takes.
        parameters: what the codes mean, stored beside them: the tensors that
            `Coding.parameters` announces.
        notes: for people.
    """

    codes: Tensor
    parameters: Stored
    notes: tuple[str, ...] = ()


class Coding(ABC):
    """Codes of an (o, d) matrix; a value, made from the options of a quantizer alone.

    Attributes:
        maskable: each entry has a code of its own and zero always has one, so that pruned weights
            stay exactly zero and may be left out of the file.
        stores_codes: False if the shape alone says the matrix; then nothing is stored.
        by_rows: the codes of a row lie after those of the row before, so that a slice of rows is
            read alone.
    """

    maskable: ClassVar[bool] = True
    stores_codes: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code: 1 to 8, unless the coding packs by itself."""

    @abstractmethod
    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """Shapes and dtypes of what is stored beside the codes, by name."""

    @abstractmethod
    def values(
        self,
        codes: Tensor,
        parameters: Stored,
        shape: tuple[int, int],
        rows: Tensor | None = None,
    ) -> Tensor:
        """The matrix (o, d) of codes (o, codes per row) uint8, as float32.

        Args:
            codes: of all rows, or of `rows`.
            parameters: as stored, of the whole matrix.
            shape: (o, d) of the whole matrix.
            rows: indices of the rows that `codes` holds; None for all.
        """

    def codes_per_row(self, in_features: int) -> int:
        """Codes of a row of `in_features` weights: one for each, unless a code spans several."""
        return in_features

    def code_bytes(self, shape: tuple[int, int], n_kept: int | None = None) -> int:
        """Bytes of the codes of a matrix, or of `n_kept` of its entries."""
        return packed_bytes(self._n_codes(shape) if n_kept is None else n_kept, self.bits)

    def pack(self, codes: Tensor) -> Tensor:
        """Flat bytes of codes: those of the matrix, or of its kept entries in row order."""
        return pack(codes, self.bits)

    def unpack(self, packed: Tensor, shape: tuple[int, int], n_kept: int | None = None) -> Tensor:
        """The inverse of `pack`: (o, codes per row), or (n_kept,)."""
        if n_kept is not None:
            return unpack(packed, self.bits, n_kept)
        return unpack(packed, self.bits, self._n_codes(shape)).view(shape[0], -1)

    def unpack_rows(self, packed: Tensor, shape: tuple[int, int], rows: Tensor) -> Tensor:
        """The codes of some rows, (len(rows), codes per row); alone if rows start on a byte."""
        width = self.codes_per_row(shape[1])
        if width % 8:
            return self.unpack(packed, shape)[rows]
        wanted = packed.view(shape[0], -1)[rows].reshape(-1)
        return unpack(wanted, self.bits, len(rows) * width).view(len(rows), width)

    def damage(
        self,
        stored: Stored,  # noqa: ARG002
        shape: tuple[int, int],  # noqa: ARG002
        n_kept: int | None,  # noqa: ARG002
    ) -> Damage | None:
        """What is wrong with stored codes and what lies beside them; None if they may be any.

        Args:
            stored: as a file holds it, of the right shapes, floats finite.
            shape: (o, d).
            n_kept: entries that have a code; None: all.
        """
        return None

    def _n_codes(self, shape: tuple[int, int]) -> int:
        return shape[0] * self.codes_per_row(shape[1])
