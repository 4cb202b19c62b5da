"""Schemes in GGUF blocks: which type, and that it decodes to the very matrix."""

from __future__ import annotations

import pytest
import torch

from autocompress.core import Scheme
from autocompress.core.errors import CheckpointError
from autocompress.export import gguf_blocks
from autocompress.export.gguf_blocks import exact_target, nearest_target, to_blocks
from autocompress.methods import CompressedWeight, LayerStatistics, compress, decode

gguf = pytest.importorskip("gguf")

EXACT = {
    "rtn(bits=2,group_size=32)": "Q4_0",
    "rtn(bits=3,group_size=64)": "Q4_0",
    "rtn(bits=4,group_size=32)": "Q4_0",
    "rtn(bits=4,group_size=128)": "Q4_0",
    "rtn(bits=4,group_size=0)": "Q4_0",
    "rtn(bits=3,group_size=32,symmetric=false)": "Q4_0",
    "rtn(bits=5,group_size=32)": "Q5_0",
    "rtn(bits=6,group_size=96)": "Q8_0",
    "rtn(bits=8,group_size=32)": "Q8_0",
    "rtn(bits=7,group_size=32,symmetric=false)": "Q8_0",
    "gptq(bits=4,group_size=64)": "Q4_0",
    "magnitude(sparsity=0.5)+rtn(bits=5,group_size=32)": "Q5_0",
    "wanda(sparsity=0.7)+rtn(bits=3,group_size=32,symmetric=false)": "Q4_0",
    "mxfp4": "MXFP4",
    "ternary(group_size=256)": "TQ2_0",
    "ternary(group_size=128)": "Q4_0",
    "binary(group_size=256)": "TQ2_0",
    "cast(dtype=float16)": "F16",
    "cast(dtype=bfloat16)": "BF16",
    "magnitude(sparsity=0.5)": "F32",
}
SHIFTED = {
    "rtn(bits=4,group_size=32,symmetric=false)": ("Q4_1", 1 / 128),
    "rtn(bits=5,group_size=64,symmetric=false)": ("Q5_1", 1 / 64),
    "magnitude(sparsity=0.5)+rtn(bits=4,group_size=32,symmetric=false)": ("Q4_1", 1 / 128),
}
REFUSED = {
    "rtn(bits=4,group_size=48)": "nearest legal value is 32",
    "rtn(bits=4,group_size=16)": "nearest legal value is 32",
    "rtn(bits=8,group_size=32,symmetric=false)": "nearest legal values are 7 bits",
    "svd(rank=9)": "without a factorization",
    "svd(rank=9)+rtn(bits=4,group_size=32)": "without a factorization",
    "nf4(group_size=32)": "whole steps of a float16 scale",
    "kmeans(bits=4)": "whole steps of a float16 scale",
    "hqq(bits=4,group_size=32)": "whole steps of a float16 scale",
    "fp8": "whole steps of a float16 scale",
    "rtn(bits=8,group_size=0)+int_inputs": "without a rounding of inputs",
}


def compressed(scheme: str, columns: int = 512) -> CompressedWeight:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, columns, generator=generator) * 0.05
    weight[0] = 0
    return compress(weight, Scheme.parse(scheme), LayerStatistics.none())


def decoded_by_gguf(weight: CompressedWeight, ggml: str) -> torch.Tensor:
    rows, _ = to_blocks(weight, ggml)
    return torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[ggml]))


@pytest.mark.parametrize(("scheme", "ggml"), EXACT.items())
def test_codes_are_carried_over_to_the_last_bit(scheme: str, ggml: str) -> None:
    weight = compressed(scheme)
    assert exact_target(weight.shape, "float32", weight.scheme).ggml == ggml
    expected = decode(weight.tensors, weight.scheme, weight.shape, torch.float32)
    assert torch.equal(decoded_by_gguf(weight, ggml), expected)


@pytest.mark.parametrize(("scheme", "ggml", "share"), [(s, *v) for s, v in SHIFTED.items()])
def test_offsets_are_rounded_by_less_than_stated(scheme: str, ggml: str, share: float) -> None:
    weight = compressed(scheme)
    assert exact_target(weight.shape, "float32", weight.scheme).ggml == ggml
    expected = decode(weight.tensors, weight.scheme, weight.shape, torch.float32)
    scales = weight.tensors["scales"].float().abs()
    step = scales.repeat_interleave(512 // scales.shape[1], 1)
    assert ((decoded_by_gguf(weight, ggml) - expected).abs() <= step * share).all()
    _, note = to_blocks(weight, ggml)
    assert "offsets rounded to float16" in note


def test_a_ragged_last_group_of_whole_blocks_is_carried_over() -> None:
    weight = compressed("rtn(bits=4,group_size=64)", columns=96)
    expected = decode(weight.tensors, weight.scheme, weight.shape, torch.float32)
    assert torch.equal(decoded_by_gguf(weight, "Q4_0"), expected)


@pytest.mark.parametrize(("scheme", "reason"), REFUSED.items())
def test_what_has_no_block_type_is_refused_with_the_rule(scheme: str, reason: str) -> None:
    found = exact_target((24, 512), "float32", Scheme.parse(scheme))
    assert found.ggml == ""
    assert reason in found.refusal


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    found = exact_target((24, 80), "float32", Scheme.parse("rtn(bits=4,group_size=32)"))
    assert "multiple of 32 wide, but got 80" in found.refusal


@pytest.mark.parametrize(
    ("scheme", "columns", "ggml"),
    [
        ("rtn(bits=4,group_size=32)", 512, "Q4_0"),
        ("rtn(bits=4,group_size=48)", 480, "Q4_0"),
        ("rtn(bits=3,group_size=48,symmetric=false)", 480, "Q4_1"),
        ("rtn(bits=8,group_size=32,symmetric=false)", 512, "Q8_0"),
        ("hqq(bits=5,group_size=32)", 512, "Q5_0"),
        ("kmeans(bits=6)", 512, "Q8_0"),
        ("svd(rank=9)", 512, "F16"),
        ("rtn(bits=4,group_size=32)", 500, "F16"),
    ],
)
def test_the_nearest_type_has_at_least_the_bits(scheme: str, columns: int, ggml: str) -> None:
    found = nearest_target((24, columns), "float32", Scheme.parse(scheme))
    assert (found.ggml, found.refusal) == (ggml, "")


def test_rounded_inputs_have_no_nearest_type() -> None:
    scheme = Scheme.parse("rtn(bits=8,group_size=0)+int_inputs")
    found = nearest_target((24, 512), "float32", scheme)
    assert "rounding of inputs" in found.refusal


def test_quantizing_again_says_by_how_much() -> None:
    weight = compressed("hqq(bits=5,group_size=32)")
    _, note = to_blocks(weight, "Q5_0")
    assert note.startswith("quantized again, to Q5_0 (5.5 bits per weight): relative error 0.0")


def test_blocks_that_decode_to_another_matrix_are_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = gguf_blocks._PACKERS | {"Q4_0": lambda d, q: gguf_blocks._PACKERS["Q4_1"](d, q + 7)}
    monkeypatch.setattr(gguf_blocks, "_PACKERS", broken)
    with pytest.raises(CheckpointError, match="must decode to the very matrix"):
        to_blocks(compressed("rtn(bits=4,group_size=32)"), "Q4_0")
