import pytest
import torch

from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import LayerStatistics, canonical, compress, decode, decode_rows
from autocompress.testing.method_contract import example_layer

NONE = LayerStatistics.none()
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def cast(weight, text):
    return compress(weight, Scheme.parse(text), NONE)


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_the_values_are_torchs_cast_and_their_bytes_lie_in_the_file(name, dtype):
    weight = example_layer(36, 90).weight
    compressed = cast(weight, f"cast(dtype={name})")
    assert torch.equal(compressed.to_dense(), weight.to(dtype).float())
    assert torch.equal(compressed.tensors["packed"].view(dtype).view(36, 90), weight.to(dtype))
    assert compressed.tensors.keys() == {"packed"}
    assert (
        cast(compressed.to_dense(), f"cast(dtype={name})").to_dense().equal(compressed.to_dense())
    )


@pytest.mark.parametrize("name", DTYPES)
def test_a_weight_of_that_type_comes_back_bit_for_bit(name):
    weight = example_layer(36, 90, name).weight
    assert torch.equal(cast(weight, f"cast(dtype={name})").to_dense(), weight)


def test_weights_beyond_float16_become_its_ends_with_a_note():
    weight = torch.tensor([[1e6, -70000.0, 65504.0, 2.0]])
    compressed = cast(weight, "cast(dtype=float16)")
    assert compressed.to_dense().tolist() == [[65504.0, -65504.0, 65504.0, 2.0]]
    assert compressed.notes == ("cast cut 2 weights to the range of float16, +-65504",)
    assert cast(weight, "cast").notes == ()


def test_bits_per_weight():
    assert cast(torch.randn(5, 7), "cast").tensors["packed"].nbytes == 2 * 35
    sparse = cast(torch.randn(64, 128), "magnitude(sparsity=0.75)+cast").tensors
    assert sum(t.nbytes for t in sparse.values()) * 8 / (64 * 128) == 16 / 4 + 1


def test_bytes_that_start_at_an_odd_place_are_read():
    compressed = cast(torch.randn(6, 10), "cast")
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), compressed.tensors["packed"]])[1:]
    args = {"packed": shifted}, compressed.scheme, compressed.shape
    assert torch.equal(decode(*args, torch.float32), compressed.to_dense())
    rows = torch.tensor([5, 0])
    assert torch.equal(decode_rows(*args, rows, torch.float32), compressed.to_dense()[rows])


def test_a_wrong_dtype_is_refused_with_the_nearest():
    with pytest.raises(SchemeError, match=r"dtype must be bfloat16 or float16.*float61.*float16"):
        canonical(Scheme.parse("cast(dtype=float61)"))
