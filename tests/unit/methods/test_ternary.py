import itertools

import pytest
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress
from autocompress.testing.method_contract import example_layer


def ternary(weight, group_size, statistics):
    text = f"ternary(group_size={group_size})"
    return compress(weight, Scheme.parse(text), statistics)


def least_error(weight, importance):
    """Over every subset of weights to keep, each with its best size."""
    best = float("inf")
    for kept in itertools.product((0.0, 1.0), repeat=len(weight)):
        costs = importance * torch.tensor(kept, dtype=torch.float64)
        size = (costs * weight.abs()).sum() / costs.sum().clamp(min=1e-300)
        values = weight.sign() * size * torch.tensor(kept, dtype=torch.float64)
        best = min(best, ((values - weight).square() * importance).sum().item())
    return best


def test_no_subset_of_kept_weights_does_better():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 8, generator=generator)
    statistics = LayerStatistics(torch.diag(torch.rand(8, generator=generator) * 5), 10**6, "x")
    importance = LayerProblem(weight, statistics).importance.double()
    dense = ternary(weight, 0, statistics).to_dense().double()
    for i in range(4):
        error = ((dense[i] - weight[i].double()).square() * importance).sum().item()
        assert error == pytest.approx(least_error(weight[i].double(), importance), rel=1e-5)


def test_it_beats_the_usual_threshold():
    layer = example_layer(40, 64)
    problem = LayerProblem(layer.weight, layer.statistics)
    sizes = layer.weight.abs()
    kept = sizes > 0.7 * sizes.mean(1, keepdim=True)
    scale = (sizes * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    usual = layer.weight.sign() * kept * scale
    found = ternary(layer.weight, 0, layer.statistics).to_dense()
    assert problem.loss(found) < problem.loss(usual)


@pytest.mark.parametrize(("group_size", "expected"), [(16, 3.0), (64, 2.25), (0, 2.125)])
def test_bits_per_weight(group_size, expected):
    layer = example_layer(64, 128)
    stored = ternary(layer.weight, group_size, layer.statistics).tensors
    assert sum(t.nbytes for t in stored.values()) * 8 / (64 * 128) == expected


def test_it_lies_between_binary_and_three_bits():
    layer = example_layer(40, 64)
    problem = LayerProblem(layer.weight, layer.statistics)
    losses = [
        problem.loss(compress(layer.weight, Scheme.parse(text), layer.statistics).to_dense())
        for text in ("binary", "ternary", "rtn(bits=3)")
    ]
    assert losses == sorted(losses, reverse=True)
