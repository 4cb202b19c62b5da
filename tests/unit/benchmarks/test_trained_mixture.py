from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import mixture as bench
import mixture_arms as arms
import mixture_model as model
import pytest
import torch
import transformers as hf

from autocompress.core import Allocation, Scheme
from autocompress.models.experts import separate_experts

USED = {0: [3, 0, 1, 2, 4, 5, 7, 6], 1: [0, 1, 2, 3, 4, 5, 6, 7]}
IDS = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def untrained():
    """As it is saved once it is trained."""
    found = model.untrained(0).eval()
    found.config.output_router_logits = False
    return found


@pytest.fixture
def module():
    return separate_experts(untrained())


def stub(module):
    """What the arms ask of a mixture, with no model to load or data to read."""
    layers = {(b, e): [f"layers.{b}.experts.{e}"] for b in USED for e in range(8)}
    return SimpleNamespace(
        layers=layers, used=USED, module=module,
        session=SimpleNamespace(base=SimpleNamespace(layout=SimpleNamespace(layers=()))),
        predicted=lambda expert, text: len(text) + expert[1] / 8,
        allocation=lambda schemes: Allocation.of(
            {f"layers.{b}.experts.{e}": Scheme.parse(t) for (b, e), t in schemes.items()}
        ),
    )  # fmt: skip


def every_arm(module):
    mixture = stub(module)
    parts = (arms.widths, arms.routers_and_attention, arms.fewer)
    return [draws for part in parts for draws in part(mixture)]


def test_every_claim_is_about_measured_arms_and_no_name_is_taken_twice(module):
    names = [draws[0].name for draws in every_arm(module)]
    assert all(len({arm.name for arm in draws}) == 1 for draws in every_arm(module))
    assert max(Counter(names).values()) == 1
    claims = (*bench.CLAIMS, *bench.PER_BYTE)
    assert {name for claim in claims for name in (claim.better, claim.worse)} <= set(names)
    assert max(Counter(claim.name for claim in claims).values()) == 1


def test_bits_of_tiers_are_three_in_the_mean_and_go_by_the_order():
    for bits in arms.TIERS.values():
        found = arms.tiers(USED, bits)
        assert Counter(found.values()) == {
            arms.gptq(b): 2 * 8 // len(bits) * bits.count(b) for b in set(bits)
        }
        assert found[0, 3] == arms.gptq(4)
        assert found[0, 6] == arms.gptq(2)


def test_the_least_used_are_merged_in_pairs_and_as_many_matrices_go_as_are_dropped():
    least = arms.reverse(USED)
    found = arms.merged(least, 2, "mean")
    assert {e for b, e in found if b == 0} == {6, 7, 5, 4}
    assert found[0, 6] == found[0, 7] == "merged(to=mean,experts=6/7)"
    groups = {(b, text) for (b, _), text in found.items()}
    assert len(found) - len(groups) == len(arms.all_dropped(arms.first(least, 2)))


def test_as_many_are_dropped_anywhere_as_in_each_block():
    mixture = stub(None)
    mixture.predicted = lambda expert, text: float(expert[1] + 3 * expert[0])
    found = arms.least_predicted_anywhere(mixture, 2)
    assert {block: set(experts) for block, experts in found.items()} == {0: {0, 1, 2, 3}, 1: set()}
    each = arms.first(arms.least_predicted(mixture), 2)
    assert len(arms.all_dropped(found)) == len(arms.all_dropped(each)) == 4


def test_predicted_bits_spend_three_per_expert_where_they_damage_least():
    mixture = stub(None)
    mixture.predicted = lambda expert, text: {
        arms.gptq(2): 4.0, arms.gptq(3): 1.0, arms.gptq(4): 0.0
    }[text] * (10 if expert == (0, 3) else 0.1 if expert == (1, 7) else 1)  # fmt: skip
    found = arms.by_prediction(mixture)
    assert found[0, 3] == arms.gptq(4)
    assert found[1, 7] == arms.gptq(2)
    assert set(found.values()) == {arms.gptq(b) for b in (2, 3, 4)}


def test_routers_over_fewer_experts_are_those_of_the_smaller_stock_model(module):
    gone = {block: [block, 7] for block in range(4)}
    before = {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    with torch.no_grad(), model.fewer_routed(module, gone):
        found = module(input_ids=IDS).logits
    whole = untrained()
    config = hf.MixtralConfig(**{**whole.config.to_dict(), "num_local_experts": 6})
    smaller = hf.MixtralForCausalLM(config).eval()
    weights = whole.state_dict()
    for block, experts in gone.items():
        kept = [e for e in range(8) if e not in experts]
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            key = f"model.layers.{block}.mlp.{name}"
            weights[key] = weights[key][kept]
    smaller.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(found, smaller(input_ids=IDS).logits)
        assert not torch.allclose(found, module(input_ids=IDS).logits)
    after = {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    assert after == before


def test_rounded_routers_are_put_back_and_save_what_they_say(module):
    router = model.routers_of(module)[2]
    weight = router.weight
    scheme = Scheme.parse(arms.rtn(4))
    with model.rounded_routers(module, scheme):
        assert not torch.equal(router.weight, weight)
        assert len(router.weight[0, :64].unique()) <= 16
    assert router.weight is weight
    rounded = 128 // 2 + 128 // 64 * 2  # codes, and a scale of 16 bits per group
    assert model.router_savings(module, scheme) == 4 * 8 * (128 * 4 - rounded)


def test_an_even_router_is_balanced_and_one_that_takes_one_pair_is_not():
    even = torch.eye(8).repeat(4, 1) * 9 + torch.eye(8).roll(1, 1).repeat(4, 1) * 9
    assert float(model.imbalance(even)) == pytest.approx(1.0, abs=1e-5)
    one = torch.tensor([9.0, 9.0, *[0.0] * 6]).repeat(32, 1)
    assert float(model.imbalance(one)) > 3.9


def test_documents_are_trained_on_or_held_out():
    found = model.texts()
    assert set(found.train).isdisjoint(found.held_out)
    assert len(found.train) // 10 <= len(found.held_out) <= len(found.train) // 8


@pytest.mark.parametrize(
    ("draws", "answer"), [([2.0, 2.0, 2.0], "holds"), ([1.2, 2.8, 2.0], "not decided")]
)
def test_chance_is_beaten_by_more_than_draws_differ(draws, answer):
    def row(name, damages, **more):
        damage = {"value": sum(damages) / len(damages), "standard_error": 0.1}
        return {"scheme": name, "damages": damages, "damage": damage, "bits": 3.0, **more}

    rows = {"a": row("a", [1.4, 1.5, 1.7]), "b": row("b", [1.9, 2.0, 2.1], draws=draws)}
    assert bench.decided(bench.Claim("x", "a", "b"), rows)["answer"] == answer


def test_draws_are_averaged_sequence_by_sequence():
    def row(value):
        return {
            "scheme": "a", "bits": 3.0, "damages": [value, 2 * value],
            "damage": {"value": value, "standard_error": 0.1}, "perplexity": {"value": value},
        }  # fmt: skip

    found = bench.mean_row([row(1.0), row(3.0)])
    assert found["damages"] == [2.0, 4.0]
    assert found["damage"]["value"] == found["perplexity"]["value"] == 2.0
    assert found["draws"] == [1.0, 3.0]
