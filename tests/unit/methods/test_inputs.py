"""Rounded inputs: against a naive per-token loop, in any basis, and their expected error."""

import pytest
import torch

from autocompress.core.errors import SchemeError
from autocompress.core.layer import LayerSpec
from autocompress.core.scheme import Scheme
from autocompress.methods import check, compress, input_errors, input_map
from autocompress.methods.hadamard import rotated, rotated_back
from autocompress.testing.method_contract import example_layer


def tokens(n, d, seed=0):
    inputs = torch.randn(2, n // 2, d, generator=torch.Generator().manual_seed(seed))
    inputs[..., :3] *= 20
    return inputs


def naive(inputs, bits):
    """As published: one symmetric scale per token."""
    largest = 2 ** (bits - 1) - 1
    rounded = torch.empty_like(inputs)
    for i, token in enumerate(inputs):
        scale = float(token.abs().max()) / largest
        for j, value in enumerate(token):
            rounded[i, j] = round(float(value) / scale) * scale
    return rounded


def map_of(text, layer):
    compressed = layer.compress(text)
    return input_map(compressed.tensors, compressed.scheme)


@pytest.mark.parametrize("bits", [4, 8])
def test_each_token_is_rounded_on_its_own_scale(bits):
    inputs = tokens(10, 64)
    found = map_of(f"rtn+int_inputs(bits={bits})", example_layer(40, 64))(inputs)
    expected = naive(inputs.reshape(-1, 64), bits).view(inputs.shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rounding_takes_place_in_the_basis_of_the_transform():
    inputs = tokens(10, 64).reshape(-1, 64)
    found = map_of("hadamard(seed=1)+rtn+int_inputs(bits=6)", example_layer(40, 64))(inputs)
    expected = rotated_back(naive(rotated(inputs, 1), 6), 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_loud_inputs_cost_less_in_a_rotated_basis():
    layer, inputs = example_layer(40, 64), tokens(200, 64).reshape(-1, 64)

    def error(text):
        return float((map_of(text, layer)(inputs) - inputs).square().sum())

    assert error("hadamard+int_inputs(bits=4)") < 0.5 * error("int_inputs(bits=4)")


def test_a_scheme_without_the_stage_reads_what_it_is_given():
    assert map_of("hadamard+rtn", example_layer(40, 64)) is None


def test_dtype_and_zero_tokens_are_kept():
    found = map_of("int_inputs", example_layer(40, 64))(torch.zeros(3, 64, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert not found.any()


@pytest.mark.parametrize("text", ["int_inputs(bits=8)", "hadamard+rtn(bits=8)+int_inputs(bits=6)"])
def test_the_expected_error_is_about_the_real_one(text):
    layer = example_layer(40, 64)
    inputs = tokens(4000, 64).reshape(-1, 64)
    hessian = inputs.T @ inputs / len(inputs)
    compressed = compress(layer.weight, Scheme.parse(text), layer.statistics)
    dense = compressed.to_dense().float()
    expected = input_errors(dense, hessian, compressed.tensors, compressed.scheme)
    mapped = input_map(compressed.tensors, compressed.scheme)
    real = ((mapped(inputs) - inputs) @ dense.T).square().mean(0)
    assert 0.4 < float(real.sum() / expected.sum()) < 2.5


def test_an_embedding_reads_ids_that_cannot_be_rounded():
    embedding = LayerSpec("wte", "embedding", None, 40, 64, "embedding", "float32", None, 0)
    with pytest.raises(SchemeError, match="wte is an embedding: it reads token ids"):
        check(embedding, Scheme.parse("rtn+int_inputs"))
