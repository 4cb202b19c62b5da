"""What a compressed layer stores and computes, known from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from autocompress.core.layer import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Cost of one layer under one scheme.

    Attributes:
        tensors: everything the file holds for the weight, by name within the layer: packed
            integers, scales, zero points, masks, factors. The bias is not part of it.
        macs_per_token: multiply-accumulates per token on dense kernels (zeros are not skipped).
        borrowed: what the layer computes with and another one stores, by the same names.
    """

    tensors: Mapping[str, TensorLayout]
    macs_per_token: int
    borrowed: Mapping[str, TensorLayout] = field(default_factory=dict)

    @property
    def read_bytes(self) -> int:
        """Bytes that computing with the layer reads: the stored and the borrowed ones."""
        return self.storage_bytes + sum(layout.n_bytes for layout in self.borrowed.values())

    @property
    def storage_bytes(self) -> int:
        """Bytes of the stored tensors: what the exported file holds, to the byte."""
        return sum(layout.n_bytes for layout in self.tensors.values())
