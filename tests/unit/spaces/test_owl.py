"""OWL's allocations against the formula, written out layer by layer."""

import pytest
import torch

from autocompress.core import Scheme
from autocompress.methods import LayerProblem, LayerStatistics
from autocompress.methods.wanda import outlier_share
from autocompress.spaces import Choice, Option, SearchSpace
from autocompress.spaces.owl import BAND, owl_baselines, owl_sparsities, takes_part

TENTHS = tuple(f"wanda(sparsity=0.{tenth})" for tenth in range(2, 9))
SHARES = {"a": 0.01, "b": 0.03, "c": 0.02, "d": 0.06}


def choice(name, texts, base_bytes=100, layers=None):
    layers = layers or (name,)
    options = [Option("base", (Scheme(()),) * len(layers), base_bytes)]
    options += [
        Option(t, (Scheme.parse(t),) * len(layers), base_bytes - 9 * i - 1)
        for i, t in enumerate(texts)
    ]
    options.sort(key=lambda option: option.storage_bytes)
    return Choice(name, layers, tuple(options), base_bytes)


def space_of(*choices):
    return SearchSpace("s", "made up", choices)


def sparsity(scheme):
    return dict(scheme.stages[0].options)["sparsity"]


def test_the_share_of_outliers_is_counted_weight_by_weight():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 9, generator=generator).pow(5)
    inputs = torch.randn(40, 9, generator=generator)
    problem = LayerProblem(weight, LayerStatistics(inputs.T @ inputs / 40, 40, "x"))
    for factor in (5.0, 2.0):
        scores = [
            [abs(float(weight[i, j])) * float(inputs[:, j].norm()) for j in range(9)]
            for i in range(12)
        ]
        mean = sum(map(sum, scores)) / (12 * 9)
        naive = sum(score > factor * mean for row in scores for score in row) / (12 * 9)
        assert 0 < naive < 1
        assert outlier_share(problem, factor) == pytest.approx(naive)
    plain = outlier_share(LayerProblem(weight, LayerStatistics.none()))
    assert plain == pytest.approx(float((weight.abs() > 5 * weight.abs().mean()).float().mean()))


@pytest.mark.parametrize("total", [0.05, 0.5, 0.7, 0.97])
def test_sparsities_keep_the_total_and_stay_in_the_band(total):
    shares, sizes = [0.01, 0.03, 0.02, 0.06], [4.0, 1.0, 2.0, 3.0]
    found = owl_sparsities(shares, sizes, total)
    mean = sum(s * n for s, n in zip(shares, sizes, strict=True)) / 10
    widest = max(abs(share - mean) for share in shares)
    band = min(BAND, total, 1 - total)
    naive = [total - band * (share - mean) / widest for share in shares]
    assert found == pytest.approx(naive)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) / 10 == pytest.approx(total)
    assert max(abs(s - total) for s in found) == pytest.approx(band)
    assert found[0] > found[2] > found[1] > found[3]


def test_layers_alike_all_get_the_total():
    assert owl_sparsities([0.1, 0.1], [1.0, 5.0], 0.6) == (0.6, 0.6)


def test_each_layer_takes_the_nearest_sparsity_that_its_choice_offers():
    space = space_of(*(choice(name, TENTHS) for name in SHARES))
    found = dict(owl_baselines(space, SHARES))
    assert list(found)[:2] == ["owl-20%-sparse", "owl-30%-sparse"]
    wanted = owl_sparsities(list(SHARES.values()), [1.0] * 4, 0.5)
    naive = [min(range(2, 9), key=lambda t: abs(t / 10 - s)) / 10 for s in wanted]
    assert [sparsity(found["owl-50%-sparse"][n]) for n in SHARES] == naive
    assert naive[3] < 0.5
    assert all(allocation in space for allocation in found.values())


def test_tied_layers_count_together_and_choices_of_few_sparsities_stay_uniform():
    tied = choice("t", TENTHS, layers=("a", "b"))
    few = choice("c", TENTHS[1:3])
    space = space_of(tied, few, choice("d", TENTHS))
    assert [c.name for c in takes_part(space)] == ["t", "d"]
    found = dict(owl_baselines(space, SHARES))["owl-50%-sparse"]
    wanted = owl_sparsities([0.02, 0.06], [1.0, 1.0], 0.5)
    assert wanted == pytest.approx((0.58, 0.42))
    assert [sparsity(found[n]) for n in "abcd"] == [0.6, 0.6, 0.4, 0.4]


@pytest.mark.parametrize(
    "texts",
    [
        TENTHS[1:3],  # two sparsities
        ("rtn(bits=4)", "rtn(bits=8)", *TENTHS),  # uniform means bits
        (),
    ],
)
def test_without_three_sparsities_nothing_is_proposed(texts):
    space = space_of(*(choice(name, texts) for name in SHARES))
    assert takes_part(space) == ()
    assert owl_baselines(space, SHARES) == ()


def test_what_is_uniform_is_not_proposed_again():
    space = space_of(*(choice(name, TENTHS) for name in SHARES))
    assert owl_baselines(space, dict.fromkeys(SHARES, 0.02)) == ()
    coarse = space_of(*(choice(n, (TENTHS[0], TENTHS[3], TENTHS[6])) for n in SHARES))
    assert owl_baselines(coarse, SHARES) == ()
