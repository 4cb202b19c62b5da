"""Cast: keep the weights in a shorter floating-point type.

The mildest option for a float32 checkpoint: float16 has three more bits of mantissa, bfloat16 the
range of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError, nearest
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Coding, Damage, Quantized, Stored, is_finite
from autocompress.methods.levels import kept_weight
from autocompress.methods.problem import LayerProblem

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_BYTES = 2


@dataclass(frozen=True, slots=True)
class CastOptions:
    """Options of a cast.

    Attributes:
        dtype: bfloat16 or float16.
    """

    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise SchemeError(
                f"dtype must be bfloat16 or float16, but got {self.dtype!r}. "
                f"{nearest(self.dtype, _DTYPES)}"
            )


@dataclass(frozen=True)
class CastCoding(Coding):
    """The values themselves, in 16 bits."""

    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """See `Coding.bits`."""
        return 8 * _BYTES

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:  # noqa: ARG002
        """See `Coding.parameters`; values need none."""
        return {}

    def values(
        self,
        codes: Tensor,
        parameters: Stored,  # noqa: ARG002
        shape: tuple[int, int],  # noqa: ARG002
        rows: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """See `Coding.values`."""
        return codes.to(torch.float32)

    def code_bytes(self, shape: tuple[int, int], n_kept: int | None = None) -> int:
        """See `Coding.code_bytes`."""
        return _BYTES * (shape[0] * shape[1] if n_kept is None else n_kept)

    def pack(self, codes: Tensor) -> Tensor:
        """See `Coding.pack`; codes are in `dtype`."""
        return codes.reshape(-1).view(torch.uint8)

    def unpack(self, packed: Tensor, shape: tuple[int, int], n_kept: int | None = None) -> Tensor:
        """See `Coding.unpack`."""
        values = self._read(packed)
        return values.view(shape) if n_kept is None else values

    def unpack_rows(self, packed: Tensor, shape: tuple[int, int], rows: Tensor) -> Tensor:
        """See `Coding.unpack_rows`; reads those rows alone."""
        return self._read(packed.view(shape[0], -1)[rows]).view(len(rows), shape[1])

    def damage(
        self,
        stored: Stored,
        shape: tuple[int, int],  # noqa: ARG002
        n_kept: int | None,  # noqa: ARG002
    ) -> Damage | None:
        """See `Coding.damage`."""
        if is_finite(self._read(stored["packed"])):
            return None
        return Damage("packed", "must hold finite numbers, but holds NaN or infinity")

    def _read(self, packed: Tensor) -> Tensor:
        if packed.storage_offset() % _BYTES:  # a mapped file; torch views none as wider values
            packed = packed.clone()
        return packed.view(self.dtype)


class Cast(Quantizer[CastOptions]):
    """A shorter floating-point type."""

    needs = Needs.NONE
    options = CastOptions
    summary = "store the weights as bfloat16 or float16"

    def coding(self, options: CastOptions) -> CastCoding:
        """See `Quantizer.coding`."""
        return CastCoding(_DTYPES[options.dtype])

    def quantize(
        self, problem: LayerProblem, mask: Tensor | None, options: CastOptions
    ) -> Quantized:
        """See `Quantizer.quantize`; weights beyond the range become its ends, with a note."""
        dtype = _DTYPES[options.dtype]
        weight, top = kept_weight(problem, mask), torch.finfo(dtype).max
        n_beyond = int((weight.abs() > top).sum())
        notes: tuple[str, ...] = ()
        if n_beyond:
            notes = (f"cast cut {n_beyond} weights to the range of {options.dtype}, +-{top:g}",)
        return Quantized(weight.clamp(-top, top).to(dtype), {}, notes)


METHODS.add("cast", Cast())
