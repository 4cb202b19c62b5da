"""Which GGUF block type holds a scheme, and a compressed weight in blocks of that type.

A block is a run of weights of one row with a scale of its own. Types by name, weights in a block,
and what a stored code q stands for, with d and m in float16:

    Q4_0, Q5_0, Q8_0    32    (q - 8) d, (q - 16) d, q d (q signed)
    Q4_1, Q5_1          32    q d + m
    TQ2_0              256    (q - 1) d
    MXFP4               32    E2M1 number times a power of two

A grid of any bits whose groups are whole blocks is carried over code by code, into the smallest
type that has all its levels, its scale repeated where a group spans several blocks: the decoded
matrix stays what it was, to the last bit. Only Q4_1 and Q5_1, which asymmetric grids of 4 and 5
bits take, round: their m is ``-zero * scale`` in float16, off by at most 2^-11 of itself, which is
less than 1/128 of a step for 4 bits and 1/64 for 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.core import Scheme
from autocompress.core.errors import CheckpointError
from autocompress.methods import CompressedWeight, decode
from autocompress.methods.cast import CastCoding
from autocompress.methods.coding import Coding
from autocompress.methods.grid import GridCoding, GridOptions
from autocompress.methods.levels import ScaledCoding
from autocompress.methods.mxfp4 import MXFP4Coding
from autocompress.methods.packing import unpack
from autocompress.methods.schemes import Plan, plan

Bytes = NDArray[np.uint8]

FLOAT_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_BLOCK, _TERNARY_BLOCK = 32, 256
_LEVELS = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
_SHIFTED = {4: "Q4_1", 5: "Q5_1"}  # asymmetric bits whose own type is smaller than one of _LEVELS
_TYPE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}


@dataclass(frozen=True, slots=True)
class Target:
    """How GGUF holds a layer.

    Attributes:
        ggml: name of the type; empty if none holds it.
        refusal: why none holds it: the rule, what was got, what is legal.
    """

    ggml: str
    refusal: str = ""


def exact_target(shape: tuple[int, int], dtype: str, scheme: Scheme) -> Target:
    """The smallest type that holds a layer (o, d) under `scheme` code by code; shapes alone.

    Args:
        shape: of the layer.
        dtype: of the base weight, for schemes that keep plain values.
        scheme: any but one that rounds inputs.
    """
    ready = plan(scheme)
    refusal = _stage_refusal(ready)
    if refusal:
        return Target("", refusal)
    coding = ready.coding
    if coding is None:
        return Target(FLOAT_TYPES[dtype])
    if isinstance(coding, CastCoding):
        return Target(FLOAT_TYPES[str(coding.dtype).removeprefix("torch.")])
    if shape[1] % _BLOCK:
        return Target("", f"rows must be a multiple of {_BLOCK} wide, but got {shape[1]} columns.")
    if isinstance(coding, MXFP4Coding):
        return Target("MXFP4")
    found = integer_levels(coding)
    if found is None:
        return Target(
            "",
            "codes must be whole steps of a float16 scale, as those of rtn, gptq, ternary and "
            f"binary are, or mxfp4, but got {scheme}.",
        )
    return _integer_target(coding, found, shape[1])


def nearest_target(shape: tuple[int, int], dtype: str, scheme: Scheme) -> Target:
    """The exact type if there is one, else the smallest with at least the scheme's bits.

    Layers that round their inputs are refused: no weights can say that.
    """
    exact = exact_target(shape, dtype, scheme)
    if exact.ggml or plan(scheme).inputs is not None:
        return exact
    coding = plan(scheme).coding
    bits = 16 if coding is None else math.ceil(8 * coding.code_bytes(shape) / math.prod(shape))
    if shape[1] % _BLOCK or bits > 8:
        return Target("BF16" if dtype == "bfloat16" else "F16")
    shifted = isinstance(coding, GridCoding) and not coding.options.symmetric
    names = ("Q4_1", "Q5_1", "Q8_0") if shifted else ("Q4_0", "Q5_0", "Q8_0")
    return Target(next(name for name in names if _TYPE_BITS[name] >= bits))


def to_blocks(weight: CompressedWeight, ggml: str) -> tuple[Bytes, str]:
    """The rows of a compressed weight in blocks, and a note on what they differ by.

    Args:
        weight: compressed, (o, d).
        ggml: type from `exact_target` or `nearest_target`.

    Returns:
        (o, bytes per row), and a sentence for the manifest.

    Raises:
        CheckpointError: the blocks do not decode to the very matrix, and the type promises that.
    """
    from gguf import GGMLQuantizationType, quants

    decoded = decode(weight.tensors, weight.scheme, weight.shape, torch.float32)
    exact = exact_target(weight.shape, _name(weight.dtype), weight.scheme)
    if ggml in FLOAT_TYPES.values():
        return float_bytes(_plain(weight, decoded), ggml), f"stored as {ggml}"
    kind = GGMLQuantizationType[ggml]
    if exact.ggml == ggml:
        blocks = _carried(weight, decoded, ggml)
    else:
        blocks = quants.quantize(decoded.numpy(), kind)
    found = torch.from_numpy(quants.dequantize(blocks, kind))
    error = float((found - decoded).abs().max())
    bits = f"{8 * blocks.shape[1] / weight.shape[1]:g} bits per weight"
    if exact.ggml != ggml:
        size = float((found - decoded).norm() / decoded.norm().clamp(min=1e-30))
        return blocks, f"quantized again, to {ggml} ({bits}): relative error {size:.4f}"
    if ggml in _SHIFTED.values():
        return (
            blocks,
            f"stored as {ggml} ({bits}): offsets rounded to float16, by up to {error:.2g}",
        )
    if error:
        raise CheckpointError(
            f"The blocks of {weight.scheme} in {ggml} must decode to the very matrix, but differ "
            f"by up to {error:.2g}. Nothing was written. Next step: export --format packed."
        )
    return blocks, f"stored as {ggml} ({bits}), code by code"


def float_bytes(values: Tensor, ggml: str) -> Bytes:
    """Values (..., d) as F32, F16 or BF16: the bytes of each row along the last axis."""
    dtypes = {ggml_name: name for name, ggml_name in FLOAT_TYPES.items()}
    stored = values.detach().cpu().to(getattr(torch, dtypes[ggml])).contiguous()
    found: Bytes = stored.view(torch.uint8).numpy()
    return found


def _stage_refusal(ready: Plan) -> str:
    stages = {
        "shared matrix": ready.share, "width": ready.width, "transform": ready.transform,
        "factorization": ready.factorize, "residual": ready.residual,
        "rounding of inputs": ready.inputs,
    }  # fmt: skip
    present = next((name for name, step in stages.items() if step is not None), None)
    if present is None:
        return ""
    return f"the format stores one matrix per layer, without a {present}, but got {ready.scheme}."


def integer_levels(coding: Coding) -> tuple[int, int] | None:
    """Smallest and largest level, if levels are integers times one float16 scale per group."""
    if isinstance(coding, GridCoding):
        return _grid_levels(coding.options)
    if not isinstance(coding, ScaledCoding) or type(coding).scales is not ScaledCoding.scales:
        return None
    if coding.parameters((1, coding.width(_BLOCK)))["scales"].dtype != "float16":
        return None
    table = coding.levels.table
    if not torch.equal(table, table.round()):
        return None
    return int(table.min()), int(table.max())


def _grid_levels(options: GridOptions) -> tuple[int, int]:
    if options.symmetric:
        return -options.offset, options.offset - 1
    return 1 - options.n_levels, options.n_levels - 1


def _integer_target(coding: Coding, found: tuple[int, int], in_features: int) -> Target:
    assert isinstance(coding, GridCoding | ScaledCoding)  # only these have integer levels
    grid = coding.options if isinstance(coding, GridCoding) else coding
    width = grid.width(in_features)
    if width % _BLOCK:
        close = max(_BLOCK, width // _BLOCK * _BLOCK)
        return Target(
            "",
            f"groups must be whole blocks of {_BLOCK} weights, but got group_size {width}. The "
            f"nearest legal value is {close}.",
        )
    shifted = isinstance(coding, GridCoding) and not coding.options.symmetric
    if shifted and coding.bits in _SHIFTED:
        return Target(_SHIFTED[coding.bits])
    whole = math.gcd(width, in_features) % _TERNARY_BLOCK == 0
    if whole and max(-found[0], found[1]) <= 1:
        return Target("TQ2_0")
    fits = (name for name, (low, high) in _LEVELS.items() if low <= found[0] and found[1] <= high)
    name = next(fits, "")
    if name:
        return Target(name)
    return Target(
        "",
        f"levels must lie in -128..127, but those of {coding.bits} bits with zero points reach "
        f"{found[0]}..{found[1]}. The nearest legal values are 7 bits, or symmetric=true.",
    )


def _carried(weight: CompressedWeight, decoded: Tensor, ggml: str) -> Bytes:
    """Blocks with the codes of `weight`; levels are read off the decoded matrix, exactly."""
    coding = plan(weight.scheme).coding
    o, d = weight.shape
    if isinstance(coding, MXFP4Coding):
        scales = coding.scales(weight.tensors, None).repeat_interleave(_BLOCK, 1)
        codes = coding.levels.codes(decoded / scales).view(-1, _BLOCK).numpy()
        exponents = weight.tensors["scales"].reshape(-1, 1).numpy()
        return _rows(o, exponents, _nibbles(codes))
    size = _TERNARY_BLOCK if ggml == "TQ2_0" else _BLOCK
    assert isinstance(coding, GridCoding | ScaledCoding)  # as `exact_target` says
    grid = coding.options if isinstance(coding, GridCoding) else coding
    width = grid.width(d)
    scale = weight.tensors["scales"].repeat_interleave(width, 1)[:, :d:size]  # (o, blocks)
    divisor = torch.where(scale == 0, 1.0, scale.float()).repeat_interleave(size, 1)
    levels = (decoded / divisor).to(torch.int16)
    stored = _bytes_of(scale)
    if ggml not in _SHIFTED.values():
        return _rows(o, *_PACKERS[ggml](stored, levels.view(-1, size).numpy()))
    zeros = unpack(weight.tensors["zeros"], coding.bits, weight.tensors["scales"].numel())
    zero = zeros.view(o, -1).repeat_interleave(width, 1)[:, :d:size].float()
    offset = _bytes_of((-zero * scale.float()).to(torch.float16))
    codes = (levels + zero.to(torch.int16).repeat_interleave(size, 1)).view(-1, size).numpy()
    return _rows(o, *_PACKERS[ggml](np.concatenate([stored, offset], axis=1), codes))


def _plain(weight: CompressedWeight, decoded: Tensor) -> Tensor:
    """The decoded matrix as the model computes with it: in the base dtype."""
    return decoded if isinstance(plan(weight.scheme).coding, CastCoding) else weight.to_dense()


def _nibbles(codes: NDArray[Any]) -> Bytes:
    """Lower halves of (n, 32) codes, the earlier 16 of a block in the low nibbles: (n, 16)."""
    low: Bytes = codes.astype(np.uint8) & np.uint8(0x0F)
    half = low.shape[1] // 2
    packed: Bytes = low[:, :half] | (low[:, half:] << np.uint8(4))
    return packed


def _fifth_bits(codes: NDArray[Any]) -> Bytes:
    return np.packbits((codes >> 4).astype(np.uint8) & 1, axis=1, bitorder="little")


def _ternary(levels: NDArray[Any]) -> Bytes:
    """Two bits each of (n, 256) levels: byte 32 i + j holds weights 128 i + 32 k + j, k = 0..3."""
    quads = (levels + 1).astype(np.uint8).reshape(len(levels), 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    packed: Bytes = np.bitwise_or.reduce(quads << shifts, axis=2).reshape(len(levels), -1)
    return packed


_PACKERS: dict[str, Callable[[Bytes, NDArray[Any]], tuple[Bytes, ...]]] = {
    "Q4_0": lambda scale, levels: (scale, _nibbles(levels + 8)),
    "Q5_0": lambda scale, levels: (scale, _fifth_bits(levels + 16), _nibbles(levels + 16)),
    "Q8_0": lambda scale, levels: (scale, levels.astype(np.int8).view(np.uint8)),
    "Q4_1": lambda scale, codes: (scale, _nibbles(codes)),
    "Q5_1": lambda scale, codes: (scale, _fifth_bits(codes), _nibbles(codes)),
    "TQ2_0": lambda scale, levels: (_ternary(levels), scale),
}


def _rows(n_rows: int, *parts: Bytes) -> Bytes:
    """Blocks from their parts, (n, bytes) each, as rows of the matrix."""
    return np.concatenate(parts, axis=1).reshape(n_rows, -1)


def _bytes_of(halves: Tensor) -> Bytes:
    """The two bytes of each float16, (n, 2)."""
    found: Bytes = halves.contiguous().view(torch.uint8).view(-1, 2).numpy()
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
