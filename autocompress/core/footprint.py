"""What a compressed layer stores and computes, known from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
    """

    tensors: Mapping[str, TensorLayout]
    macs_per_token: int

    @property
    def storage_bytes(self) -> int:
        """Bytes of the stored tensors: what the exported file holds, to the byte."""
        return sum(layout.n_bytes for layout in self.tensors.values())
