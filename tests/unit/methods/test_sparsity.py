import pytest
import torch

from autocompress.core.errors import ModelError, SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import (
    METHODS,
    LayerProblem,
    LayerStatistics,
    canonical,
    check,
    compress,
    decode,
    strongest,
)
from autocompress.methods.sparsity import keep_highest, keep_pattern, n_kept_of
from autocompress.testing.method_contract import example_layer


def naive_keep(scores, n_kept):
    """Sort each row; of ties drop the first."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        ranked = sorted(range(len(row)), key=lambda j: (row[j], j))
        mask[i, ranked[len(row) - n_kept :]] = True
    return mask


@pytest.mark.parametrize("n_kept", [1, 5, 12, 20])
@pytest.mark.parametrize("n_values", [1, 3, 1000])
def test_keeping_the_highest_matches_sorting_with_ties(n_kept, n_values):
    generator = torch.Generator().manual_seed(n_kept)
    scores = torch.randint(0, n_values, (6, 20), generator=generator).float()
    assert torch.equal(keep_highest(scores, n_kept), naive_keep(scores, n_kept))


def test_at_least_one_weight_is_kept():
    assert n_kept_of(10, 0.99) == 1
    assert n_kept_of(10, 0.5) == 5
    assert n_kept_of(10, 0.01) == 10


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_magnitude_drops_an_exact_count_of_the_smallest_weights_of_the_layer(sparsity):
    weight = torch.randn(13, 17)
    dense = compress(
        weight, Scheme.parse(f"magnitude(sparsity={sparsity})"), LayerStatistics.none()
    ).to_dense()
    kept = dense != 0
    assert int(kept.sum()) == 13 * 17 - round(sparsity * 13 * 17)
    assert weight[kept].abs().min() >= weight[~kept].abs().max()
    assert torch.equal(dense[kept], weight[kept])


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_wanda_keeps_the_same_count_in_every_row_by_weight_times_input_norm(sparsity):
    inputs = torch.randn(100, 20) * torch.logspace(-1, 1, 20)
    weight = torch.randn(9, 20)
    statistics = LayerStatistics(inputs.T @ inputs / 100, 100, "x")
    dense = compress(weight, Scheme.parse(f"wanda(sparsity={sparsity})"), statistics).to_dense()
    n_kept = 20 - round(sparsity * 20)
    scores = weight.abs() * inputs.norm(dim=0)
    assert torch.equal(dense != 0, naive_keep(scores, n_kept))


def test_wanda_loses_less_than_magnitude_where_some_inputs_are_loud():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 64, generator=generator) * torch.logspace(-1, 1, 64)
    weight = torch.randn(32, 64, generator=generator)
    problem = LayerProblem(weight, LayerStatistics(inputs.T @ inputs / 500, 500, "x"))
    losses = [
        problem.loss(compress(weight, Scheme.parse(name), problem.statistics).to_dense())
        for name in ("wanda", "magnitude")
    ]
    assert losses[0] < 0.5 * losses[1]


def test_wanda_without_statistics_compares_magnitudes_and_says_so():
    compressed = compress(torch.randn(4, 8), Scheme.parse("wanda"), LayerStatistics.none())
    assert compressed.notes == (
        "wanda compared magnitudes per row: the layer has no calibration statistics",
    )
    assert (compressed.to_dense() != 0).sum(1).tolist() == [4] * 4


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_equal_weights_are_dropped_in_order(name):
    dense = compress(torch.ones(1, 6), Scheme.parse(name), LayerStatistics.none()).to_dense()
    assert dense.tolist() == [[0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 48)])
@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.999])
def test_the_promised_count_is_the_count_of_the_mask(name, shape, sparsity):
    method = METHODS[name]
    options = method.options(sparsity)
    mask, _ = method.mask(LayerProblem(torch.zeros(shape), LayerStatistics.none()), options)
    assert int(mask.sum()) == method.n_kept(shape, options)


@pytest.mark.parametrize(("got", "nearby"), [("-0.5", "0.05"), ("0.0", "0.05"), ("1.5", "0.95")])
def test_a_sparsity_outside_zero_and_one_is_refused_with_a_legal_value(got, nearby):
    with pytest.raises(SchemeError, match=rf"sparsity must be .* got {got}\..* nearby is {nearby}"):
        canonical(Scheme.parse(f"magnitude(sparsity={got})"))


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (4, 8), (3, 5)])
@pytest.mark.parametrize("n_values", [1, 3, 1000])
def test_a_pattern_keeps_the_highest_of_every_m_with_ties(pattern, n_values):
    generator = torch.Generator().manual_seed(pattern[1])
    scores = torch.randint(0, n_values, (6, 40), generator=generator).float()
    expected = naive_keep(scores.view(-1, pattern[1]), pattern[0]).view(6, 40)
    assert torch.equal(keep_pattern(scores, pattern), expected)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:5"])
def test_exactly_n_of_every_m_weights_stay(name, pattern):
    kept, width = map(int, pattern.split(":"))
    layer = example_layer(12, 80)
    method = METHODS[name]
    mask, _ = method.mask(
        LayerProblem(layer.weight, layer.statistics), method.options(pattern=pattern)
    )
    assert (mask.view(-1, width).sum(1) == kept).all()
    assert method.n_kept((12, 80), method.options(pattern=pattern)) == int(mask.sum())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wanda(pattern=)", "wanda(sparsity=0.5)"),
        ("wanda(pattern=2:4)", "wanda(pattern=2:4,sparsity=0.5)"),
        ("wanda(pattern=02: 4,sparsity=0.5)", "wanda(pattern=2:4,sparsity=0.5)"),
        ("wanda(pattern=1:4)", "wanda(pattern=1:4,sparsity=0.75)"),
        ("wanda(pattern=1:3,sparsity=0.6666666667)", f"wanda(pattern=1:3,sparsity={1 - 1 / 3!r})"),
    ],
)
def test_schemes_that_mean_the_same_pattern_are_equal(text, expected):
    scheme = canonical(Scheme.parse(text))
    assert str(scheme) == expected
    assert canonical(scheme) == scheme


@pytest.mark.parametrize("pattern", ["4:4", "0:4", "2:128", "2-4", "half"])
def test_a_malformed_pattern_is_refused_with_a_legal_one(pattern):
    with pytest.raises(SchemeError, match=r"pattern must be N:M, .* A legal value is 2:4\."):
        canonical(Scheme.parse(f"wanda(pattern={pattern})"))


def test_a_sparsity_that_contradicts_the_pattern_is_refused():
    with pytest.raises(SchemeError, match=r"agree with the pattern 1:4, which is 0\.75, but got"):
        canonical(Scheme.parse("wanda(pattern=1:4,sparsity=0.6)"))


@pytest.mark.parametrize(
    ("pattern", "d", "advice"),
    [
        ("4:8", 36, r"needs a multiple of 8 inputs, but got 36\. The nearest legal value is 3:6\."),
        ("2:4", 90, r"but got 90\. The nearest legal value is 1:2\."),
        ("2:4", 37, r"but got 37\. Leave the pattern out and give sparsity=0\.5\."),
        ("3:4", 90, r"but got 90\. Leave the pattern out and give sparsity=0\.25\."),
    ],
)
def test_a_layer_that_m_does_not_divide_is_refused_with_what_to_do(pattern, d, advice):
    layer = example_layer(8, d).spec
    with pytest.raises(SchemeError, match=advice):
        check(layer, Scheme.parse(f"magnitude(pattern={pattern})"))


def test_a_pattern_stays_where_the_stronger_method_takes_over():
    layer = example_layer(12, 80).spec
    found = strongest(layer, Scheme.parse("magnitude(pattern=2:4,refit=true)"))
    assert found == canonical(Scheme.parse("wanda(pattern=2:4,refit=true)"))


def test_a_damaged_mask_is_refused():
    compressed = example_layer(40, 64).compress("magnitude(sparsity=0.7)")
    tensors = {**compressed.tensors, "mask": torch.zeros_like(compressed.tensors["mask"])}
    with pytest.raises(ModelError, match="must keep 768 of 2560 weights, but keeps 0"):
        decode(tensors, compressed.scheme, compressed.shape, torch.float32)
