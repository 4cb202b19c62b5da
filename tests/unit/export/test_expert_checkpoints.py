"""Checkpoints of mixtures of experts."""

import json

import pytest
import torch
import transformers as hf

from autocompress.core import Allocation, Scheme
from autocompress.export import load, write_packed
from autocompress.export.dense import write_dense
from autocompress.export.tensor_file import read_header, stored_bytes, weight_files
from autocompress.methods import LayerStatistics, compress, compress_together, footprint
from autocompress.models import BaseModel, describe, overridden, weight_matrix
from autocompress.models.experts import separate_experts

IDS = torch.arange(24).reshape(2, 12) * 7 % 300 + 5
SCHEME = Scheme.parse("rtn(bits=4,group_size=16)")


@pytest.fixture(scope="module")
def base():
    """A tiny Qwen 2 mixture: its stock files name experts nearly as ours do."""
    torch.manual_seed(0)
    config = hf.Qwen2MoeConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, intermediate_size=24, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40,
    )  # fmt: skip
    module = hf.Qwen2MoeForCausalLM(config).eval().requires_grad_(False)
    separate_experts(module)
    return BaseModel(module, describe(module), None, "nowhere", "AutoModelForCausalLM", "0" * 32)


@pytest.fixture(scope="module")
def weights(base):
    """Every second expert compressed, and all else as it is."""
    return {
        layer.name: compress(weight_matrix(base.module, layer), SCHEME, LayerStatistics.none())
        for layer in base.layout.layers
        if layer.expert is not None and layer.expert.index % 2
    }


@pytest.fixture(scope="module")
def expected(base, weights):
    dense = {name: weight.to_dense() for name, weight in weights.items()}
    with overridden(base.module, base.layout, dense):
        return base.module(IDS).logits


def test_packed_and_plain_experts_side_by_side_reload_to_the_last_bit(
    base, weights, expected, tmp_path
):
    write_packed(base, weights, tmp_path / "out", claim={})
    names = {name for path in weight_files(tmp_path / "out") for name in read_header(path)}
    experts = "model.layers.0.mlp.experts"
    assert f"{experts}.down_proj.1.packed" in names
    assert f"{experts}.down_proj.0.weight" in names
    assert f"{experts}.down_proj" not in names
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load_plainly(tmp_path / "again")(IDS).logits, expected)


def test_a_checkpoint_without_a_compressed_expert_stores_them_one_by_one_too(base, tmp_path):
    head = base.layout.layer("lm_head")
    weight = compress(weight_matrix(base.module, head), SCHEME, LayerStatistics.none())
    write_packed(base, {"lm_head": weight}, tmp_path / "out", claim={})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["separate_experts"] is True
    with overridden(base.module, base.layout, {"lm_head": weight.to_dense()}):
        expected = base.module(IDS).logits
    assert torch.equal(load(tmp_path / "out")(IDS).logits, expected)


def test_a_dense_checkpoint_is_one_of_stock_transformers(base, weights, expected, tmp_path):
    dense = {name: weight.to_dense() for name, weight in weights.items()}
    write_dense(base, dense, Allocation.of({}), tmp_path / "out", claim={})
    model = load_plainly(tmp_path / "out")
    assert type(model.model.layers[0].mlp.experts).__name__ == "Qwen2MoeExperts"
    torch.testing.assert_close(model(IDS).logits, expected)


@pytest.fixture(scope="module")
def fewer(base):
    """Experts 0 and 2 merged, 3 dropped, 1 as it is."""
    stack = "model.layers.0.mlp.experts"
    found = {}
    for part in ("gate_up_proj", "down_proj"):
        names = [f"{stack}.{part}.{expert}" for expert in (0, 2, 3)]
        merged, other, dropped = (weight_matrix(base.module, base.layout.layer(n)) for n in names)
        scheme = Scheme.parse("merged(experts=0/2)+rtn(bits=4)+eora(rank=2)")
        alike = compress_together([merged, other], scheme, [LayerStatistics.none()] * 2)
        alone = compress(dropped, Scheme.parse("drop"), LayerStatistics.none())
        found |= dict(zip(names, (*alike, alone), strict=True))
    return found


def computed(base, weights, ids=IDS):
    dense = {name: weight.to_dense() for name, weight in weights.items()}
    with overridden(base.module, base.layout, dense):
        return base.module(ids).logits


@pytest.mark.parametrize("kernels", ["reference", "dense"])
def test_merged_and_dropped_experts_reload_to_the_last_bit_and_byte(base, fewer, tmp_path, kernels):
    claimed = base.layout.base_bytes - sum(
        base.layout.layer(n).base_bytes - footprint(base.layout.layer(n), w.scheme).storage_bytes
        for n, w in fewer.items()
    )
    write_packed(base, fewer, tmp_path / "out", claim={"storage_bytes": claimed})
    assert stored_bytes(tmp_path / "out") == claimed
    names = {name for path in weight_files(tmp_path / "out") for name in read_header(path)}
    stack = "model.layers.0.mlp.experts.down_proj"
    assert {n.rpartition(f"{stack}.")[2] for n in names if n.startswith(stack)} == {
        "0.packed", "0.scales", "0.r.a.values", "0.r.b.values", "1.weight", "2.r.a.values",
        "2.r.b.values",
    }  # fmt: skip
    loaded = load(tmp_path / "out", kernels=kernels)
    assert torch.equal(loaded(IDS).logits, computed(base, fewer))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load_plainly(tmp_path / "again")(IDS).logits, computed(base, fewer))


def test_stock_transformers_computes_with_merged_and_dropped_experts(base, fewer, tmp_path):
    dense = {name: weight.to_dense() for name, weight in fewer.items()}
    write_dense(base, dense, Allocation.of({}), tmp_path / "out", claim={})
    found = load_plainly(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(found, computed(base, fewer))


def test_dropping_an_expert_changes_those_tokens_alone_that_are_sent_to_it(base, fewer):
    holder = base.module.model.layers[0].mlp.experts
    sent = []
    with holder.register_forward_pre_hook(lambda _, given: sent.append(given[1])):
        before = base.module(IDS).logits
    dropped = {name: weight for name, weight in fewer.items() if name.endswith(".3")}
    after = computed(base, dropped)
    reached = (sent[0] == 3).any(1).view(IDS.shape)
    assert 0 < int(reached.sum()) < reached.numel()
    # One block: what a token attends to is computed before the experts.
    changed = (before != after).any(-1)
    assert torch.equal(changed, reached)


def load_plainly(path):
    return hf.AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
