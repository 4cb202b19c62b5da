"""Merged and dropped experts: who they are, what is exact, what is stored."""

from dataclasses import replace

import pytest
import torch
from layers import problem_of

from autocompress.core import Scheme
from autocompress.core.errors import SchemeError
from autocompress.core.layer import Place
from autocompress.methods import (
    METHODS,
    LayerProblem,
    LayerStatistics,
    canonical,
    compress,
    compress_together,
    decode_rows,
    drops,
    footprint,
    sharing_layers,
)
from autocompress.methods.problem import DAMPING
from autocompress.testing.method_contract import example_layer

NAME = "model.layers.1.mlp.experts.down_proj.3"


def problems(counts=(64, 192)):
    return [problem_of(24, 16, n_tokens=n, seed=seed) for seed, n in enumerate(counts)]


def together(found, text):
    weights = [problem.weight for problem in found]
    statistics = [problem.statistics for problem in found]
    return compress_together(weights, Scheme.parse(text), statistics, problems=found)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (NAME, Place("model.layers.1.mlp.experts.down_proj", 3, "")),
        ("model.layers.1.mlp.down_proj", None),
        ("h.3", None),
        ("lm_head", None),
    ],
)
def test_a_place_among_experts_is_the_name_around_its_last_number(name, place):
    assert Place.of_expert(name) == place
    assert place is None or place.at(place.number) == name


def test_merged_layers_are_of_experts_of_one_block():
    scheme = Scheme.parse("merged(experts=0/3)")
    stack = NAME.removesuffix("3")
    assert sharing_layers(NAME, scheme) == (f"{stack}0", f"{stack}3")
    for name in (f"{stack}1", "model.layers.3.mlp.down_proj", "h.3"):
        with pytest.raises(SchemeError, match=f"{name} must be one of them, but got experts=0/3"):
            sharing_layers(name, scheme)


def test_equal_experts_are_merged_without_loss():
    found = problems()
    alike = [found[0], found[1].with_weight(found[0].weight)]
    for to in ("mean", "busiest"):
        for one in together(alike, f"merged(experts=0/1,to={to})"):
            assert torch.equal(one.to_dense(), found[0].weight)


def test_the_merged_matrix_is_the_mean_nearest_in_the_outputs_of_all_tokens():
    """Naive: the gradient of the damped loss of all tokens, each expert's by its own number."""
    found = problems()
    target, notes = METHODS["merged"].target(found, METHODS["merged"].options())
    assert notes == ()
    gradients = [
        p.n_tokens
        * (target.double() - p.weight.double())
        @ (p.hessian.double() + DAMPING * p.hessian.diagonal().mean() * torch.eye(16))
        for p in found
    ]
    assert float(sum(gradients).norm()) < 1e-5 * float(gradients[0].norm())
    by_tokens = (found[0].weight + 3 * found[1].weight) / 4
    for other in (by_tokens, (found[0].weight + found[1].weight) / 2):
        losses = [sum(p.n_tokens * p.loss(m) for p in found) for m in (target, other)]
        assert losses[0] < losses[1]


def test_the_busiest_expert_stands_for_all():
    first, second = together(problems(), "merged(experts=0/1,to=busiest)")
    assert torch.equal(first.to_dense(), problems()[1].weight)
    assert torch.equal(second.to_dense(), first.to_dense())


def test_an_expert_that_no_token_was_sent_to_has_no_say():
    seen, unseen = problems()
    unseen = LayerProblem(unseen.weight, LayerStatistics(None, 0, "unseen"))
    for to in ("mean", "busiest"):
        for one in together([unseen, seen], f"merged(experts=0/1,to={to})"):
            assert torch.equal(one.to_dense(), seen.weight)
            assert one.notes == ()
    rounded = together([unseen, seen], "merged(experts=0/1)+gptq(bits=3)")[0]
    alone = compress(seen.weight, Scheme.parse("gptq(bits=3)"), seen.statistics)
    assert torch.equal(rounded.to_dense(), alone.to_dense())


def test_without_statistics_experts_are_merged_to_their_plain_mean_and_say_so():
    found = [LayerProblem(p.weight, LayerStatistics.none()) for p in problems()]
    for one in together(found, "merged(experts=0/1)"):
        torch.testing.assert_close(one.to_dense(), (found[0].weight + found[1].weight) / 2)
        assert "plain mean" in one.notes[0]


def test_experts_that_saw_no_tokens_fall_back_together_and_say_so():
    none = [LayerProblem(p.weight, LayerStatistics.none()) for p in problems()]
    unseen = together(none, "merged(experts=0/1)+gptq(bits=4)")
    assert all("no calibration statistics" in " ".join(one.notes) for one in unseen)
    seen = together(problems((2, 9)), "merged(experts=0/1)+gptq(bits=4)")
    assert all(one.notes == () for one in seen)


def test_merged_experts_are_stored_once_to_the_byte():
    spec = replace(example_layer(40, 32).spec, name=NAME)
    scheme = Scheme.parse("merged(experts=0/3)+rtn(bits=4,group_size=16)+eora(rank=2)")
    first, other = (footprint(replace(spec, name=NAME[:-1] + e), scheme) for e in "03")
    correction = 2 * 2 * (40 + 32)
    assert first.storage_bytes == 40 * 32 // 2 + 2 * 40 * 2 + correction
    assert other.storage_bytes == correction
    assert other.read_bytes == first.read_bytes == first.storage_bytes


def test_a_dropped_layer_is_zero_and_costs_nothing():
    spec, weight = example_layer(40, 32).spec, example_layer(40, 32).weight
    found = compress(weight, Scheme.parse("drop"), LayerStatistics.none())
    assert found.tensors == {}
    assert torch.equal(found.to_dense(), torch.zeros_like(weight))
    rows = decode_rows({}, found.scheme, found.shape, torch.tensor([3, 0]), torch.bfloat16)
    assert torch.equal(rows, torch.zeros(2, 32, dtype=torch.bfloat16))
    claimed = footprint(spec, found.scheme)
    assert (claimed.storage_bytes, claimed.macs_per_token) == (0, 0)
    assert drops(found.scheme)
    assert not drops(Scheme.parse("rtn(bits=2)"))


@pytest.mark.parametrize("text", ["svd(rank=2)+drop", "drop+eora", "merged(experts=0/1)+drop"])
def test_drop_stands_alone(text):
    with pytest.raises(SchemeError, match=r"drop leaves nothing .* Write drop, or leave it out"):
        canonical(Scheme.parse(text))
