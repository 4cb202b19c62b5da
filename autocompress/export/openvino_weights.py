"""Which constants hold a compressed layer in an OpenVINO model, and their bytes. Needs no OpenVINO.

OpenVINO decompresses weights in the graph, in the form that its plugins have kernels for::

    (codes [- zero points]) * scales        one scale, and zero point, per group of a row

Codes are of the type i4, u4, i8 or u8 (https://docs.openvino.ai, "Weight compression"), scales
float16. Codes and scales are those of the search. Codes of fewer bits than the type has are stored
in it unchanged, and the file grows by as much. Low rank is two such matrices. Codes in a rotated
basis stay there, and the graph rotates what they are applied to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core import Scheme, Stage
from autocompress.core.errors import CheckpointError
from autocompress.export.gguf_blocks import integer_levels
from autocompress.methods import METHODS, Coding, CompressedWeight
from autocompress.methods.base import Quantizer
from autocompress.methods.cast import CastCoding
from autocompress.methods.grid import GridCoding
from autocompress.methods.hadamard import HadamardOptions
from autocompress.methods.hqq import FloatZeroCoding
from autocompress.methods.levels import ScaledCoding
from autocompress.methods.packing import pack, unpack
from autocompress.methods.schemes import Plan, plan
from autocompress.methods.storage import MatrixStorage, under

FLOATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_NIBBLE = 4
_USUAL_GROUP = 128


@dataclass(frozen=True, slots=True)
class Element:
    """The type of the codes of a matrix.

    Attributes:
        name: as OpenVINO spells it; empty if none holds them.
        refusal: why none does: the rule, what was got, what is legal.
    """

    name: str
    refusal: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class StoredMatrix:
    """A matrix (o, d) as constants.

    Attributes:
        shape: (o, d).
        element: type of the codes, or of plain values.
        data: bytes of the codes, row by row, in 4 bits the earlier one in the low half.
        scales: (o, G) float16; None for plain values.
        zeros: (o, G) of `zeros_element`; None if codes are signed.
        zeros_element: type of the zero points.
    """

    shape: tuple[int, int]
    element: str
    data: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    zeros_element: str = ""


def refusal(shape: tuple[int, int], dtype: str, scheme: Scheme) -> str:
    """Why a layer (o, d) of `dtype` under `scheme` cannot be held; empty if it can. Shapes alone.

    Args:
        shape: of the layer.
        dtype: of the base weight.
        scheme: any.
    """
    ready = plan(scheme)
    transform = None if rotation_seed(scheme) is not None else ready.transform
    stages = {
        "shared matrix": ready.sharing, "width": ready.width,
        "transform other than hadamard": transform,
        "residual": ready.residual, "rounding of inputs": ready.inputs,
    }  # fmt: skip
    present = next((name for name, step in stages.items() if step is not None), None)
    if present is not None:
        return (
            "it holds layers as one matrix or two factors, rotated (hadamard) or not, without a "
            f"{present}, but got {ready.scheme}."
        )
    found = (element(s, dtype, ready).refusal for s in ready.matrices(shape).values())
    return next(filter(None, found), "")


def rotation_seed(scheme: Scheme) -> int | None:
    """Seed of the rotation into whose basis the inputs go; None if there is none."""
    step = plan(scheme).transform
    options = None if step is None else step.options
    return options.seed if isinstance(options, HadamardOptions) else None


def element(shape: tuple[int, int], dtype: str, ready: Plan) -> Element:
    """The type that holds a matrix (o, d) of a scheme code by code."""
    coding = ready.coding
    if coding is None:
        return Element(FLOATS[dtype])
    if isinstance(coding, CastCoding):
        return Element(FLOATS[str(coding.dtype).removeprefix("torch.")])
    levels = integer_levels(coding)
    if levels is None and not isinstance(coding, FloatZeroCoding):
        return Element(
            "",
            "codes must be whole steps of a float16 scale, as those of rtn, gptq, ternary, binary "
            f"and hqq are, but got {ready.scheme}. The nearest legal scheme is "
            f"{_on_a_grid(ready, coding, shape)}.",
        )
    width, d = _width(coding, shape[1]), shape[1]
    if d % width:
        return Element(
            "",
            f"group_size must divide the {d} columns or be 0 (the whole row), but got {width}. "
            f"The nearest legal value is {_nearest_group(width, d)}.",
        )
    if _has_zeros(coding):
        return Element("u4" if coding.bits <= _NIBBLE else "u8")
    assert levels is not None  # only codings with zero points have no integer levels
    return Element("i4" if levels[0] >= -8 and levels[1] <= 7 else "i8")


def _on_a_grid(ready: Plan, coding: Coding, shape: tuple[int, int]) -> Scheme:
    """The scheme with integers of about as many bits, at least 2, in place of its codes."""
    bits = math.ceil(8 * coding.code_bytes(shape) / math.prod(shape))
    group = _nearest_group(_USUAL_GROUP, shape[1])
    grid = Stage.of("gptq", {"bits": min(max(bits, 2), 8), "group_size": group})
    return Scheme(
        tuple(grid if isinstance(METHODS[s.method], Quantizer) else s for s in ready.scheme.stages)
    )


def _nearest_group(width: int, d: int) -> int:
    return min((n for n in range(1, d + 1) if d % n == 0), key=lambda n: (abs(n - width), -n))


def stored_matrices(weight: CompressedWeight) -> tuple[StoredMatrix, ...]:
    """The matrix of a compressed weight, or its factors A (o, r) and B (r, d); rotated, if it is.

    Raises:
        CheckpointError: the constants do not decode to the very matrix, as they should.
    """
    return tuple(_matrices(weight))


def note(matrices: tuple[StoredMatrix, ...], scheme: Scheme) -> str:
    """What the manifest says of a layer that is stored so; `scheme` is that of the search."""
    coding = plan(scheme).coding
    bits = 32 if coding is None else coding.bits
    kinds = " and ".join(dict.fromkeys(matrix.element for matrix in matrices))
    stored = matrices[0].element
    wider = int(stored[1:]) if stored[0] in "iu" else 0
    widened = f", {bits}-bit codes in {wider} bits" if wider > bits else ""
    factors = " (two factors)" if len(matrices) == 2 else ""
    rotated = "" if rotation_seed(scheme) is None else ", in a rotated basis"
    return f"stored as {kinds}{factors}{widened}{rotated}"


def _matrices(weight: CompressedWeight) -> Iterator[StoredMatrix]:
    ready = plan(weight.scheme)
    dtype = str(weight.dtype).removeprefix("torch.")
    for prefix, shape in ready.matrices(weight.shape).items():
        kind = element(shape, dtype, ready).name
        tensors = under(prefix, weight.tensors)
        sparsify = ready.sparsify
        n_kept = None if sparsify is None else sparsify.method.n_kept(shape, sparsify.options)
        values = MatrixStorage(shape, ready.coding, n_kept).decode(tensors)
        if kind in FLOATS.values():
            yield plain(values, kind)
        else:
            assert ready.coding is not None  # plain values are floats
            yield _coded(values, tensors, ready, kind)


def plain(values: Tensor, kind: str) -> StoredMatrix:
    """Values (o, d) as they are, in the floating-point type `kind`."""
    dtype = next(name for name, short in FLOATS.items() if short == kind)
    stored = values.detach().to(getattr(torch, dtype)).contiguous()
    return StoredMatrix((stored.shape[0], stored.shape[1]), kind, stored.view(torch.uint8))


def _coded(values: Tensor, tensors: dict[str, Tensor], ready: Plan, kind: str) -> StoredMatrix:
    """Codes are read off the decoded values, and must give them back exactly."""
    coding = ready.coding
    assert coding is not None  # the caller has checked
    shape = (values.shape[0], values.shape[1])
    width = _width(coding, shape[1])
    scales = tensors["scales"]
    zeros = _zeros(coding, tensors)
    per_weight = scales.float().repeat_interleave(width, 1)
    codes = values / torch.where(per_weight == 0, 1.0, per_weight)
    offset = torch.zeros(()) if zeros is None else zeros.float().repeat_interleave(width, 1)
    codes = codes.add_(offset).round_()
    if not torch.equal((codes - offset) * per_weight, values):
        raise CheckpointError(
            f"The constants of {ready.scheme} must decode to the very matrix, but do not. Nothing "
            "was written. Next step: export --format packed."
        )
    zeros_kind = ""
    if zeros is not None:
        zeros_kind = kind if zeros.dtype == torch.uint8 else "f16"
    return StoredMatrix(shape, kind, _bytes(codes, kind), scales, zeros, zeros_kind)


def _bytes(codes: Tensor, kind: str) -> Tensor:
    """The bytes of whole numbers, float32, in an integer type."""
    whole = codes.to(torch.int16) & (0xF if kind.endswith("4") else 0xFF)
    small = whole.to(torch.uint8).flatten()
    if not kind.endswith("4"):
        return small
    return pack(small, _NIBBLE)[: -(-small.numel() // 2)]


def nibbles(values: Tensor) -> Tensor:
    """The bytes of 4-bit zero points, uint8."""
    return pack(values.flatten(), _NIBBLE)[: -(-values.numel() // 2)]


def _width(coding: Coding, in_features: int) -> int:
    assert isinstance(coding, GridCoding | ScaledCoding | FloatZeroCoding)  # `element` checks
    grid = coding if isinstance(coding, ScaledCoding) else coding.options
    return grid.width(in_features)


def _has_zeros(coding: Coding) -> bool:
    return isinstance(coding, FloatZeroCoding) or (
        isinstance(coding, GridCoding) and not coding.options.symmetric
    )


def _zeros(coding: Coding, tensors: dict[str, Tensor]) -> Tensor | None:
    """Zero points (o, G): uint8 on a grid, float16 of hqq; None if there are none."""
    if isinstance(coding, FloatZeroCoding):
        return tensors["zeros"]
    if not _has_zeros(coding):
        return None
    scales = tensors["scales"]
    return unpack(tensors["zeros"], coding.bits, scales.numel()).view(scales.shape)
