import pytest
import torch

from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, canonical, compress
from autocompress.testing.method_contract import example_layer


def binary(layer, group_size):
    return compress(
        layer.weight, Scheme.parse(f"binary(group_size={group_size})"), layer.statistics
    )


def test_sizes_are_weighted_means():
    layer = example_layer(12, 90)
    importance = LayerProblem(layer.weight, layer.statistics).importance
    dense = binary(layer, 16).to_dense()
    for i in range(12):
        for start in range(0, 90, 16):
            part = slice(start, start + 16)
            total = sum(importance[part].tolist())
            pairs = zip(importance[part].tolist(), layer.weight[i, part].tolist(), strict=True)
            size = torch.tensor(sum(h * abs(w) for h, w in pairs) / total)
            expected = layer.weight[i, part].sign() * size
            assert torch.allclose(dense[i, part], expected, rtol=2**-10)


def test_no_other_size_has_less_weighted_error():
    layer = example_layer(12, 90)
    importance = LayerProblem(layer.weight, layer.statistics).importance
    dense = binary(layer, 0).to_dense()

    def errors(factor):
        return ((factor * dense - layer.weight).square() * importance).sum(1)

    assert all((errors(1) <= errors(f)).all() for f in (0.9, 0.98, 1.02, 1.1))


def test_it_cannot_follow_a_sparsifier():
    with pytest.raises(SchemeError, match="binary has no code for zero"):
        canonical(Scheme.parse("wanda(sparsity=0.5)+binary"))


@pytest.mark.parametrize(("group_size", "expected"), [(16, 2.0), (64, 1.25), (0, 1.125)])
def test_bits_per_weight(group_size, expected):
    layer = example_layer(64, 128)
    stored = binary(layer, group_size).tensors
    assert sum(t.nbytes for t in stored.values()) * 8 / (64 * 128) == expected
