import dataclasses

import pytest
import torch

from autocompress.core.errors import ModelError, SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress, decode_rows, footprint
from autocompress.testing.method_contract import example_layer

WIDE = example_layer(36, 90)


def loss_of(layer, text):
    problem = LayerProblem(layer.weight, layer.statistics)
    return problem.loss(layer.compress(text).to_dense())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_base_scheme_stores_the_weight_bit_for_bit(dtype):
    weight = torch.randn(6, 10, dtype=torch.float64).to(getattr(torch, dtype))
    compressed = compress(weight, Scheme.parse("base"), LayerStatistics.none())
    assert torch.equal(compressed.tensors["values"], weight)
    assert torch.equal(compressed.to_dense(), weight)


@pytest.mark.parametrize("text", ["base", "magnitude", "svd(rank=5)", "wanda+gptq(bits=4)"])
def test_a_transposed_weight_compresses_like_its_contiguous_copy(text):
    weight = WIDE.weight.T.contiguous().T
    assert not weight.is_contiguous()
    compressed = compress(weight, Scheme.parse(text), WIDE.statistics)
    expected = WIDE.compress(text)
    for name, tensor in compressed.tensors.items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected.tensors[name])


@pytest.mark.parametrize("sparsifier", ["magnitude(sparsity=0.6)", "wanda(sparsity=0.6)"])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_zeros_stay_zero_through_quantization(sparsifier, quantizer, bits, symmetric):
    pruned = WIDE.compress(sparsifier).to_dense() == 0
    text = f"{sparsifier}+{quantizer}(bits={bits},group_size=32,symmetric={symmetric})"
    dense = WIDE.compress(text).to_dense()
    assert (dense[pruned] == 0).all()


def test_the_outer_factor_is_compressed_for_what_the_compressed_inner_factor_puts_out():
    inner = {
        name.removeprefix("b."): tensor
        for name, tensor in WIDE.compress("svd_llm(rank=12)+rtn(bits=2)").tensors.items()
        if name.startswith("b.")
    }
    decoded = compress(torch.zeros(12, 90), Scheme.parse("rtn(bits=2)"), LayerStatistics.none())
    b = dataclasses.replace(decoded, tensors=inner).to_dense()
    a = WIDE.compress("svd_llm(rank=12)+rtn(bits=2)").to_dense() @ torch.linalg.pinv(b)
    hessian = WIDE.statistics.hessian
    best = WIDE.weight @ hessian @ b.T @ torch.linalg.pinv(b @ hessian @ b.T)
    # Two bits on A are the only difference to the least-squares A for this B.
    problem = LayerProblem(WIDE.weight, WIDE.statistics)
    assert problem.loss(a @ b) < 2.5 * problem.loss(best @ b)


@pytest.mark.parametrize("stage", ["rtn(bits=3)", "gptq(bits=3)", "wanda+rtn(bits=8)"])
def test_refitting_the_outer_factor_beats_compressing_the_factors_apart(stage):
    problem = LayerProblem(WIDE.weight, WIDE.statistics)
    factors = WIDE.compress("svd_llm(rank=16)").tensors
    inner = compress(factors["b.values"], Scheme.parse(stage), WIDE.statistics).to_dense()
    hessian = factors["b.values"] @ WIDE.statistics.hessian @ factors["b.values"].T
    through = LayerStatistics((hessian + hessian.T) / 2, 512, "through")
    outer = compress(factors["a.values"], Scheme.parse(stage), through).to_dense()
    assert loss_of(WIDE, f"svd_llm(rank=16)+{stage}") < problem.loss(outer @ inner)


def test_a_quantized_layer_takes_the_bits_that_it_promises():
    layer = dataclasses.replace(WIDE.spec, out_features=256, in_features=512)
    n, groups = 256 * 512, 256 * 4
    symmetric = footprint(layer, Scheme.parse("gptq(bits=4,group_size=128)"))
    assert symmetric.storage_bytes == n // 2 + 2 * groups
    asymmetric = footprint(layer, Scheme.parse("gptq(bits=4,group_size=128,symmetric=false)"))
    assert asymmetric.storage_bytes == n // 2 + 2 * groups + groups // 2
    sparse = footprint(layer, Scheme.parse("wanda(sparsity=0.5)+rtn(bits=4,group_size=128)"))
    assert sparse.storage_bytes == n // 8 + n // 4 + 2 * groups


def test_a_mask_is_stored_only_if_it_makes_the_layer_smaller():
    layer = dataclasses.replace(WIDE.spec, out_features=64, in_features=64)
    for text, has_mask in {
        "wanda(sparsity=0.5)": True,
        "wanda(sparsity=0.02)": False,
        "wanda(sparsity=0.5)+rtn(bits=2)": False,
        "wanda(sparsity=0.6)+rtn(bits=2)": True,
        "wanda(sparsity=0.2)+rtn(bits=4)": False,
    }.items():
        assert ("mask" in footprint(layer, Scheme.parse(text)).tensors) is has_mask, text


def test_factors_cost_fewer_multiplications_and_zeros_cost_as_many():
    assert footprint(WIDE.spec, Scheme.parse("svd(rank=10)")).macs_per_token == 10 * (36 + 90)
    assert footprint(WIDE.spec, Scheme.parse("wanda+rtn")).macs_per_token == 36 * 90


def test_looking_up_a_factorized_embedding_costs_one_factor():
    embedding = dataclasses.replace(WIDE.spec, kind="embedding", macs_per_token=0)
    assert footprint(embedding, Scheme.parse("rtn")).macs_per_token == 0
    assert footprint(embedding, Scheme.parse("svd(rank=10)")).macs_per_token == 10 * 90


@pytest.mark.parametrize("width", [64, 37])
@pytest.mark.parametrize(
    "text",
    [
        "base", "rtn(bits=3)", "rtn(bits=4,group_size=8)", "rtn(bits=5,symmetric=false)",
        "rtn(bits=8)", "wanda", "wanda+rtn",
    ],
)  # fmt: skip
def test_rows_are_those_of_the_whole_matrix_bit_for_bit(text, width):
    weight = torch.randn(50, width, dtype=torch.bfloat16)
    compressed = compress(weight, Scheme.parse(text), LayerStatistics.none())
    rows = torch.tensor([49, 0, 7, 7])
    looked_up = decode_rows(
        compressed.tensors, compressed.scheme, compressed.shape, rows, torch.bfloat16
    )
    assert torch.equal(looked_up, compressed.to_dense()[rows])


def test_no_rows_are_no_rows():
    compressed = compress(torch.randn(8, 16), Scheme.parse("rtn"), LayerStatistics.none())
    rows = torch.empty(0, dtype=torch.int64)
    got = decode_rows(compressed.tensors, compressed.scheme, (8, 16), rows, torch.float32)
    assert got.shape == (0, 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("text", ["base", "rtn", "gptq", "magnitude", "wanda", "svd(rank=2)"])
def test_weights_that_are_not_finite_are_refused(text, value):
    weight = torch.randn(8, 16)
    weight[3, 5] = value
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        compress(weight, Scheme.parse(text), LayerStatistics.none())


def test_statistics_that_are_not_finite_or_do_not_fit_are_refused():
    weight, scheme = torch.randn(8, 16), Scheme.parse("rtn")
    with pytest.raises(ModelError, match="statistics must be finite"):
        compress(weight, scheme, LayerStatistics(torch.full((16, 16), torch.nan), 9, "x"))
    with pytest.raises(SchemeError, match=r"\(16, 16\) matrix .* but got \(8, 8\)"):
        compress(weight, scheme, LayerStatistics(torch.eye(8), 9, "x"))


@pytest.mark.parametrize("weight", [torch.randn(4), torch.empty(0, 4), torch.ones(2, 2).int()])
def test_what_is_not_a_matrix_of_numbers_is_refused(weight):
    with pytest.raises(SchemeError, match="non-empty floating-point matrix"):
        compress(weight, Scheme.parse("rtn"), LayerStatistics.none())


@pytest.mark.parametrize(
    "text",
    ["rtn(bits=2)", "gptq(bits=3,symmetric=false)", "wanda+gptq", "svd_llm(rank=3)+wanda+gptq"],
)
@pytest.mark.parametrize("n_tokens", [0, 1, 512])
def test_a_weight_of_zeros_stays_one(text, n_tokens):
    hessian = torch.ones(16, 16) if n_tokens == 1 else torch.eye(16) * (n_tokens > 0)
    statistics = LayerStatistics(hessian, n_tokens, "x")
    dense = compress(torch.zeros(12, 16), Scheme.parse(text), statistics).to_dense()
    assert (dense == 0).all()


def test_a_note_says_which_factor_it_is_about():
    none = LayerStatistics.none()
    compressed = compress(WIDE.weight, Scheme.parse("svd(rank=10)+gptq"), none)
    reason = "gptq rounded to nearest: the layer has no calibration statistics"
    assert compressed.notes == (f"factor b: {reason}", f"factor a: {reason}")
