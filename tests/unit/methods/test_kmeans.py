import dataclasses

import pytest
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress, kmeans
from autocompress.methods.kmeans import KMeansOptions, compensated, fit, nearest
from autocompress.testing.method_contract import example_layer


def exact_cost(points, shares, n_codewords, zero):
    """Least cost of one row over all divisions into intervals, in float64.

    With `zero`, one codeword is zero, wherever it helps most.
    """
    pairs = sorted(zip(points.tolist(), shares.tolist(), strict=True))
    n = len(pairs)
    costs = torch.full((n + 1, n + 1), float("inf"), dtype=torch.float64)
    at_zero = costs.clone()
    for start in range(n + 1):
        mass = first = second = 0.0
        costs[start, start] = at_zero[start, start] = 0.0
        for stop in range(start + 1, n + 1):
            point, share = pairs[stop - 1]
            mass, first, second = mass + share, first + share * point, second + share * point**2
            costs[start, stop] = max(second - first**2 / mass, 0.0)
            at_zero[start, stop] = second
    free, fixed = costs[0].clone(), at_zero[0].clone()
    for _ in range(n_codewords - 1):
        fixed = torch.minimum((fixed[:, None] + costs).amin(0), (free[:, None] + at_zero).amin(0))
        free = (free[:, None] + costs).amin(0)
    return float(fixed[n] if zero else free[n])


def cost_of(weight, importance, mask, codebook):
    """Cost of each row with the nearest codewords."""
    off = (weight[:, :, None] - codebook[:, None]).abs().amin(-1).double()
    shares = importance.double().expand(weight.shape)
    return (off.square() * (shares if mask is None else shares * mask)).sum(1)


def row_problem(o, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randn(d, generator=generator).mul(1.5).exp()
    mask = torch.rand(o, d, generator=generator) < 0.6
    return torch.randn(o, d, generator=generator), importance, mask


def naive_compensated(weight, mask, codebook, factor):
    """Row by row, input by input, in float64."""
    upper, order = factor.upper.double(), factor.order.tolist()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for i in range(len(weight)):
        row, words = weight[i, order].double(), codebook[i].double()
        for k, j in enumerate(order):
            code = int((words - row[k]).abs().argmin())
            if mask is not None and not mask[i, j]:
                code = int(words.abs().argmin())
            codes[i, j] = code
            row[k + 1 :] -= (row[k] - words[code]) / upper[k, k] * upper[k, k + 1 :]
    return codes


def loss_of(layer, text):
    problem = LayerProblem(layer.weight, layer.statistics)
    return problem.loss(layer.compress(text).to_dense())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_are_nearly_the_best_possible(bits, masked):
    weight, importance, mask = row_problem(3, 200)
    codebook = fit(weight, importance, mask if masked else None, KMeansOptions(bits))
    found = cost_of(weight, importance, mask if masked else None, codebook)
    for i in range(3):
        kept = mask[i] if masked else torch.ones(200, dtype=torch.bool)
        best = exact_cost(weight[i, kept], importance[kept], 2**bits, zero=masked)
        assert best * (1 - 1e-3) <= float(found[i]) <= best * 1.01  # less only by rounding


@pytest.mark.parametrize("masked", [False, True])
def test_rows_no_longer_than_the_bins_start_from_the_optimum(masked):
    weight, importance, mask = row_problem(2, 32)
    codebook = fit(weight, importance, mask if masked else None, KMeansOptions(3, iterations=0))
    found = cost_of(weight, importance, mask if masked else None, codebook)
    for i in range(2):
        kept = mask[i] if masked else torch.ones(32, dtype=torch.bool)
        best = exact_cost(weight[i, kept], importance[kept], 8, zero=masked)
        assert float(found[i]) == pytest.approx(best, rel=1e-3)


def test_iterations_lower_the_cost_of_what_they_start_from():
    weight, importance, _ = row_problem(8, 400)
    start, end = (
        cost_of(weight, importance, None, fit(weight, importance, None, KMeansOptions(4, n)))
        for n in (0, 20)
    )
    assert (end <= start * (1 + 1e-4)).all()
    assert end.sum() < start.sum()


@pytest.mark.parametrize("masked", [False, True])
def test_codes_are_those_of_the_nearest_codewords(masked):
    weight, importance, mask = row_problem(5, 60)
    mask = mask if masked else None
    codebook = fit(weight, importance, mask, KMeansOptions(3))
    values = codebook.gather(1, nearest(weight, mask, codebook).long())
    if masked:
        assert (values[~mask] == 0).all()
        weight, values = weight * mask, values * mask
    off = (weight[:, :, None] - codebook[:, None]).abs().amin(-1)
    torch.testing.assert_close((weight - values).abs(), off, rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_compensation_matches_the_naive_one(masked):
    layer = example_layer(6, 70)
    problem = LayerProblem(layer.weight, layer.statistics)
    mask = torch.rand(6, 70, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    codebook = fit(problem.weight, problem.importance, mask, KMeansOptions(3))
    factor = problem.inverse_factor(by_activation=True, damping=0.01)
    codes = compensated(problem.weight, mask, codebook, factor)
    expected = naive_compensated(problem.weight, mask, codebook, factor)
    # A weight within float32 rounding of a boundary may fall to either side.
    assert (codes != expected).float().mean() < 0.01


def test_rows_of_few_values_are_exact():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(9, 4, generator=generator).half().float()
    weight = values.gather(1, torch.randint(0, 4, (9, 50), generator=generator))
    for text in ("kmeans(bits=2)", "kmeans(bits=6)"):
        dense = compress(weight, Scheme.parse(text), LayerStatistics.none()).to_dense()
        assert torch.equal(dense, weight)


def test_a_row_without_pruned_weights_needs_no_codeword_at_zero():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 1.0], [1.0, 2.0, 3.0, 9.0, 9.0]])
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    codebook = fit(weight, torch.ones(5), mask, KMeansOptions(2))
    assert codebook.tolist() == [[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize("text", ["wanda(sparsity=0.6)", "magnitude(sparsity=0.03)"])
@pytest.mark.parametrize("compensate", ["true", "false"])
def test_pruned_weights_stay_zero(text, compensate):
    layer = example_layer(40, 64)
    pruned = layer.compress(text).to_dense()
    dense = layer.compress(f"{text}+kmeans(bits=3,compensate={compensate})").to_dense()
    assert (dense[pruned == 0] == 0).all()


@pytest.mark.parametrize("prefix", ["", "wanda(sparsity=0.5)+"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compensation_loses_less(bits, prefix):
    layer = example_layer(64, 96)
    plain = loss_of(layer, f"{prefix}kmeans(bits={bits},compensate=false)")
    assert loss_of(layer, f"{prefix}kmeans(bits={bits})") < plain


def test_weighting_by_importance_loses_less_than_plain_clusters():
    layer = example_layer(64, 96)
    problem = LayerProblem(layer.weight, layer.statistics)
    losses = []
    for importance in (problem.importance, torch.ones(96)):
        codebook = fit(problem.weight, importance, None, KMeansOptions(2))
        codes = nearest(problem.weight, None, codebook).long()
        losses.append(problem.loss(codebook.gather(1, codes)))
    assert losses[0] < 0.7 * losses[1]


def test_two_bits_of_codebook_beat_two_bits_of_grid():
    layer = example_layer(64, 96)
    rounded = loss_of(layer, "rtn(bits=2,group_size=0)")
    assert loss_of(layer, "kmeans(bits=2,compensate=false)") < 0.8 * rounded


def test_without_statistics_nothing_is_compensated_and_it_says_so():
    layer = dataclasses.replace(example_layer(16, 64), statistics=LayerStatistics.none())
    compressed = layer.compress("kmeans(bits=3)")
    assert compressed.notes == (
        "kmeans did not compensate: the layer has no calibration statistics",
    )
    plain = layer.compress("kmeans(bits=3,compensate=false)")
    assert plain.notes == ()
    assert torch.equal(compressed.to_dense(), plain.to_dense())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_stores_its_codebook_in_float16(bits):
    layer = example_layer(16, 64)
    n_bytes = sum(t.nbytes for t in layer.compress(f"kmeans(bits={bits})").tensors.values())
    assert 8 * n_bytes / (16 * 64) == bits + 16 * 2**bits / 64


@pytest.mark.parametrize("text", ["kmeans(bits=3)", "wanda+kmeans(bits=3,compensate=false)"])
def test_parts_of_few_rows_give_the_same(text, monkeypatch):
    layer = example_layer(40, 64)
    whole = layer.compress(text)
    monkeypatch.setattr(kmeans, "_COSTS_AT_ONCE", 3 * 65**2)
    monkeypatch.setattr(kmeans, "_INDICES_AT_ONCE", 7 * 64)
    parts = layer.compress(text)
    assert all(torch.equal(parts.tensors[name], whole.tensors[name]) for name in whole.tensors)
    assert torch.equal(parts.to_dense(), whole.to_dense())
