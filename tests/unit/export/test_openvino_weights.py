"""Constants of OpenVINO models: read back naively, they give the matrix that was measured."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from autocompress.core import Scheme
from autocompress.export.openvino_weights import (
    StoredMatrix,
    nibbles,
    note,
    refusal,
    rotation_seed,
    stored_matrices,
)
from autocompress.methods import LayerStatistics, compress
from autocompress.methods.hadamard import rotated_back

WEIGHT = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))


def stored(text: str) -> tuple[torch.Tensor, tuple[StoredMatrix, ...]]:
    weight = compress(WEIGHT, Scheme.parse(text), LayerStatistics.none())
    return weight.to_dense(), stored_matrices(weight)


def read(matrix: StoredMatrix) -> torch.Tensor:
    """Weight by weight, as the documentation of OpenVINO's types has it."""
    raw = matrix.data.flatten().numpy()
    (o, d), kind = matrix.shape, matrix.element
    if kind in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
        return torch.from_numpy(raw.copy()).view(dtype).view(o, d).float()
    if kind.endswith("4"):
        raw = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[: o * d]
    codes = raw.astype(np.int32).reshape(o, d)
    if kind.startswith("i"):
        top = 8 if kind == "i4" else 128
        codes = np.where(codes >= top, codes - 2 * top, codes)
    assert matrix.scales is not None
    width = d // matrix.scales.shape[1]
    result = torch.empty(o, d)
    for row in range(o):
        for column in range(d):
            group = row, column // width
            zero = 0.0 if matrix.zeros is None else float(matrix.zeros[group])
            result[row, column] = (int(codes[row, column]) - zero) * float(matrix.scales[group])
    return result


@pytest.mark.parametrize(
    ("text", "element"),
    [
        ("rtn(bits=4,group_size=32)", "i4"),
        ("rtn(bits=3,group_size=0)", "i4"),
        ("rtn(bits=2,group_size=16,symmetric=false)", "u4"),
        ("rtn(bits=4,group_size=32,symmetric=false)", "u4"),
        ("rtn(bits=5,group_size=32)", "i8"),
        ("rtn(bits=8,group_size=96)", "i8"),
        ("rtn(bits=8,group_size=32,symmetric=false)", "u8"),
        ("hqq(bits=4,group_size=32)", "u4"),
        ("hqq(bits=6,group_size=0)", "u8"),
        ("ternary(group_size=32)", "i4"),
        ("binary(group_size=48)", "i4"),
        ("magnitude(sparsity=0.9)+rtn(bits=4,group_size=32)", "i4"),
        ("magnitude(sparsity=0.9)+rtn(bits=3,group_size=32,symmetric=false)", "u4"),
        ("magnitude(sparsity=0.5)", "f32"),
        ("cast(dtype=bfloat16)", "bf16"),
        ("cast(dtype=float16)", "f16"),
    ],
)
def test_the_constants_hold_the_very_matrix(text: str, element: str) -> None:
    dense, (matrix,) = stored(text)
    assert matrix.element == element
    assert torch.equal(read(matrix), dense)


def test_low_rank_is_two_matrices() -> None:
    dense, (outer, inner) = stored("svd(rank=4)+rtn(bits=8,group_size=4)")
    assert (outer.shape, inner.shape) == ((6, 4), (4, 96))
    torch.testing.assert_close(read(outer) @ read(inner), dense)
    scheme = Scheme.parse("svd(rank=4)+rtn(bits=8,group_size=4)")
    assert note((outer, inner), scheme) == "stored as i8 (two factors)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rtn(bits=3,group_size=32)", "stored as i4, 3-bit codes in 4 bits"),
        ("rtn(bits=4,group_size=32)", "stored as i4"),
        ("hadamard+rtn(bits=5,group_size=32)", "stored as i8, 5-bit codes in 8 bits, in a rotated"
         " basis"),
    ],
)  # fmt: skip
def test_the_note_says_where_codes_were_widened_or_rotated(text: str, said: str) -> None:
    _, matrices = stored(text)
    assert note(matrices, Scheme.parse(text)) == said


def test_codes_of_a_rotated_basis_stay_in_it() -> None:
    scheme = Scheme.parse("hadamard(seed=5)+rtn(bits=4,group_size=32)")
    dense, (matrix,) = stored(str(scheme))
    assert rotation_seed(scheme) == 5
    assert refusal((6, 96), "float32", scheme) == ""
    torch.testing.assert_close(rotated_back(read(matrix), 5), dense)
    assert rotation_seed(Scheme.parse("rtn(bits=4,group_size=32)")) is None


def test_an_odd_number_of_zero_points_ends_in_half_a_byte() -> None:
    assert nibbles(torch.tensor([[1], [2], [15]], dtype=torch.uint8)).tolist() == [0x21, 0x0F]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rtn(bits=4,group_size=40)", "must divide the 96 columns .* nearest legal value is 48"),
        ("nf4", "whole steps of a float16 scale"),
        ("kmeans(bits=3)", "whole steps of a float16 scale"),
        ("awq+rtn(bits=4,group_size=32)", "without a transform other than hadamard"),
        (
            "hadamard+trellis(bits=3)",
            r"got hadamard\(seed=0\)\+trellis\(bits=3,.* The nearest "
            r"legal scheme is hadamard\(seed=0\)\+gptq\(bits=3,group_size=96\)\.$",
        ),
        ("rtn(bits=4,group_size=32)+eora(rank=2)", "without a residual"),
        ("rtn(bits=8,group_size=0)+int_inputs(bits=8)", "without a rounding of inputs"),
        ("tied+rtn(bits=4,group_size=32)", "without a shared matrix"),
        ("basis_sharing(rank=4)", "without a shared matrix"),
        ("svd(rank=5)+rtn(bits=4,group_size=4)", "must divide the 5 columns"),
    ],
)
def test_what_has_no_constants_is_refused_with_its_rule(text: str, reason: str) -> None:
    assert re.search(reason, refusal((6, 96), "float32", Scheme.parse(text)))
