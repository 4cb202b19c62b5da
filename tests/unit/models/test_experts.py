import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

from autocompress.core import ExpertOf, LayerSpec, Scheme
from autocompress.methods import compress, footprint
from autocompress.models import (
    CurvatureStore,
    StatisticsStore,
    collect_curvature,
    collect_statistics,
    describe,
    overridden,
    weight_matrix,
)
from autocompress.models.experts import Routed, separate_experts, stack_experts
from autocompress.models.prefix_plan import Event, make_plan
from autocompress.models.routing import count_routed
from autocompress.spaces import load_space
from autocompress.testing.tiny_models import tiny_batches, tiny_model

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "intermediate_size": 24,
    "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: hf.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40
    ),
    "deepseek-v3": lambda: hf.DeepseekV3Config(
        **SIZES, n_routed_experts=4, moe_intermediate_size=24, n_group=1, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8,
        qk_nope_head_dim=8,
    ),
    "gpt-oss": lambda: hf.GptOssConfig(
        **SIZES, num_local_experts=4, head_dim=8, eos_token_id=2, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0
        },
    ),
}  # fmt: skip
IDS = torch.arange(24).reshape(2, 12) * 7 % 300 + 5


def stock(name):
    """A stock model with stacked experts that computes expert by expert."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_separate_experts_compute_what_stacked_ones_do_and_stack_again(name):
    model = stock(name)
    experts = model.model.layers[1].mlp.experts
    stacked = experts.down_proj
    expected = model(IDS).logits
    before = {n: t.clone() for n, t in model.state_dict().items()}
    separate_experts(model)
    one = model.model.layers[1].mlp.experts.down_proj[2].weight
    assert torch.equal(one, stacked[2])
    assert one.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()  # no copy
    # products of a transposed weight and a bias are rounded in another order
    tolerance = 1e-5 if name == "gpt-oss" else 0
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=tolerance)
    assert model is separate_experts(model)
    stack_experts(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_expert_is_a_layer_that_costs_its_share_of_the_tokens(name):
    model = separate_experts(stock(name))
    layout = describe(model)
    experts = [layer for layer in layout.layers if layer.expert is not None]
    mixtures = 1 if name == "deepseek-v3" else 2
    assert len(experts) == mixtures * 4 * 2
    assert {layer.role for layer in experts} == {"gate_up", "down"}
    for layer in experts:
        assert layer.expert == ExpertOf(int(layer.name.rpartition(".")[2]), 4, 2)
        assert layer.macs_per_token == layer.n_weights // 2
        assert layer.input_name == layer.name
        assert (layer.out_features, layer.in_features) in ((48, 32), (32, 24))
        assert LayerSpec.from_json(layer.to_json()) == layer
    # exactly two experts of four multiply for each token
    assert sum(x.macs_per_token for x in experts) == sum(x.n_weights for x in experts) // 2
    low_rank = footprint(experts[0], Scheme.parse("svd(rank=4)")).macs_per_token
    assert low_rank == 4 * (48 + 32) // 2
    routers = {layer.name for layer in layout.layers if layer.role == "router"}
    gates = {f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)}
    assert routers == (gates if name == "qwen2-moe" else set())
    assert not any(layer.name.endswith("mlp.gate") for layer in layout.layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_space_that_does_not_name_routers_searches_one(name, tmp_path):
    """Plain routers are no layers; what is one, as the gate of shared experts, stays as it is."""
    layers = describe(separate_experts(stock(name))).layers
    routers = {layer.name for layer in layers if layer.role == "router"}
    everything = tmp_path / "all.yaml"
    text = "schema_version: 1\nname: all\ndescription: All.\nchoices:\n  - layers: ['*']\n"
    everything.write_text(f"{text}    options: [base, rtn(bits=4)]\n")
    for space in ("experts", "quick", str(everything)):
        searched = set(load_space(space, layers).searched_layers)
        assert searched == {layer.name for layer in layers} - routers, space


def test_experts_of_another_interface_stay_stacked():
    model = stock("mixtral")
    model.model.layers[0].mlp.experts.register_buffer("scale", torch.ones(4))
    separate_experts(model)
    layout = describe(model)
    assert {layer.block for layer in layout.layers if layer.expert is not None} == {1}


def test_an_expert_is_swapped_alone():
    model = separate_experts(stock("mixtral"))
    layout = describe(model)
    layer = layout.layer("model.layers.1.mlp.experts.gate_up_proj.3")
    weight = weight_matrix(model, layer) * 0.5
    changed = stack_experts(copy.deepcopy(model))
    changed.model.layers[1].mlp.experts.gate_up_proj[3] *= 0.5
    before = model(IDS).logits
    with overridden(model, layout, {layer.name: weight}):
        assert torch.equal(model(IDS).logits, changed(IDS).logits)
    assert torch.equal(model(IDS).logits, before)
    assert not torch.equal(changed(IDS).logits, before)


def routed_inputs(model, batches):
    """By (block, expert): the tokens (n, d) without padding that stock experts are given."""
    seen = {}
    for block, layer in enumerate(model.model.layers):

        def keep(_, arguments, block=block):
            seen.setdefault(block, []).append(arguments[:2])

        layer.mlp.experts.register_forward_pre_hook(keep)
    for batch in batches:
        model(**batch)
    found = {}
    for block, calls in seen.items():
        for expert in range(4):
            rows = []
            for (x, chosen), batch in zip(calls, batches, strict=True):
                counts = batch["attention_mask"].flatten() == 1
                rows.append(x[(chosen == expert).any(1) & counts])
            found[block, expert] = torch.cat(rows)
    return found


def test_statistics_of_an_expert_are_of_the_tokens_that_are_sent_to_it(tmp_path):
    model, batches = tiny_model("mixtral"), tiny_batches("mixtral")
    layout, store = describe(model), StatisticsStore(tmp_path)
    collect_statistics(model, layout, batches, store)
    counts = count_routed(model, layout, batches)
    plain = stack_experts(copy.deepcopy(model))
    with torch.no_grad():
        inputs = routed_inputs(plain, batches)
    for (block, expert), x in inputs.items():
        experts = plain.model.layers[block].mlp.experts
        gate, up = (x @ experts.gate_up_proj[expert].T).detach().chunk(2, dim=1)
        for part, rows in (("gate_up_proj", x), ("down_proj", functional.silu(gate) * up)):
            name = f"model.layers.{block}.mlp.experts.{part}.{expert}"
            found = store.get(layout.layer(name))
            assert found.n_tokens == counts[name] == len(rows)
            torch.testing.assert_close(found.hessian, rows.T @ rows / len(rows))
    assert len(set(counts.values())) > 1
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert sum(counts.values()) == n_tokens * 2 * 2 * 2  # two of four, two parts, two blocks


def test_an_expert_that_saw_fewer_tokens_has_more_of_a_ridge_and_one_of_none_is_rounded(tmp_path):
    model, batches = tiny_model("mixtral"), tiny_batches("mixtral", n_batches=3)
    layout, store = describe(model), StatisticsStore(tmp_path)
    collect_statistics(model, layout, batches, store)
    counts = count_routed(model, layout, batches)
    experts = [x for x in layout.layers if x.role == "gate_up" and x.block == 0]
    scheme = Scheme.parse("gptq(bits=4,group_size=32)")
    for layer in experts:
        statistics = store.get(layer)
        assert statistics.ridge == 64 / (4 * counts[layer.name])
        assert compress(weight_matrix(model, layer), scheme, statistics).notes == ()
    assert experts[0].input_name is not None
    store.put(experts[0].input_name, None, 0)
    found = compress(weight_matrix(model, experts[0]), scheme, store.get(experts[0]))
    assert found.notes == ("gptq rounded to nearest: the layer has no calibration statistics",)


def test_experts_that_nothing_reaches_are_named_in_one_warning(tmp_path, caplog):
    """However small the windows are: of a real mixture there may be thousands."""
    model, batches = tiny_model("mixtral"), tiny_batches("mixtral", padded=False)
    with torch.no_grad():
        for block in model.model.layers:  # equal scores: all tokens go to the same two experts
            block.mlp.gate.weight.zero_()
    layout = describe(model)
    counts = count_routed(model, layout, batches)
    first, second, third, *others = [name for name, count in counts.items() if not count]
    assert len(others) == 5
    where = f"layers {first!r}, {second!r}, {third!r} and 5 more"

    def loss(module, batch, _):
        return module(input_ids=batch["input_ids"]).logits.square().sum(), len(batch["input_ids"])

    curvature, statistics = CurvatureStore(tmp_path / "c"), StatisticsStore(tmp_path / "s")
    collect_curvature(model, layout, batches, loss, curvature, memory_budget_bytes=1)
    collect_statistics(model, layout, batches, statistics, memory_budget_bytes=1)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"No gradient reached {where} in calibration: errors there count as harmless.",
        f"No token reached {where} in calibration: no statistics there.",
    ]


def test_curvature_of_an_expert_adds_up_over_the_tokens_of_a_sequence(tmp_path):
    model = tiny_model("mixtral").double()
    batch = tiny_batches("mixtral", n_batches=1, padded=False)[0]
    target = torch.randn(4, 32, 320, generator=torch.Generator().manual_seed(0)).double()

    def loss(module, inputs, _):
        return (module(input_ids=inputs["input_ids"]).logits * target).sum(), 4

    layout, store = describe(model), CurvatureStore(tmp_path)
    names = [f"model.layers.0.mlp.experts.{p}.1" for p in ("gate_up_proj", "down_proj")]
    collect_curvature(model, layout, [batch], loss, store, layers=names)
    plain = stack_experts(copy.deepcopy(model)).requires_grad_(True)
    plain.set_experts_implementation("eager")
    gradients = {"gate_up_proj": [], "down_proj": []}
    for i in range(4):
        plain.zero_grad()
        (plain(input_ids=batch["input_ids"][i : i + 1]).logits * target[i : i + 1]).sum().backward()
        for part, found in gradients.items():
            found.append(getattr(plain.model.layers[0].mlp.experts, part).grad[1].clone())
    for name, found in zip(names, gradients.values(), strict=True):
        exact = sum(g.T @ g for g in found) / 4
        by_output = sum(g.square().sum(1) for g in found) / 4
        curvature = store.get(layout.layer(name))
        rows, hessian = curvature.rows.double(), curvature.hessian.double()
        scale = float(exact.diagonal().max())
        torch.testing.assert_close(rows.sum() * hessian, exact, rtol=1e-4, atol=1e-5 * scale)
        shares = by_output / by_output.sum()
        torch.testing.assert_close(rows / rows.sum(), shares, rtol=1e-4, atol=1e-9)


def test_routed_tokens_know_their_sequence_unless_sequences_differ():
    routed = Routed(torch.tensor([0, 3, 4, 5]), 6)
    assert routed.sequences(2).tolist() == [0, 1, 1, 1]
    assert routed.sequences(4) is None
    mask = torch.tensor([[True, True, True], [False, True, True]])
    assert routed.counting(mask).tolist() == [True, False, True, True]
    assert routed.counting(torch.ones(2, 4, dtype=torch.bool)) is None


def test_an_expert_that_no_token_was_sent_to_still_belongs_to_its_block():
    layout = describe(tiny_model("mixtral"))
    ends = [Event(kind, name) for name in layout.blocks for kind in ("start", "end")]
    plan = make_plan(ends, layout)
    name = "model.layers.1.mlp.experts.down_proj.0"
    assert [name in step.layers for step in plan.steps] == [False, True]
