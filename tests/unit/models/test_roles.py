"""Role words of architectures beyond the tiny families, read off models without weights."""

from collections import Counter

import pytest
import torch
import transformers as hf

from autocompress.models import CurvatureStore, collect_curvature, describe
from autocompress.models.experts import separate_experts
from autocompress.models.layout import unnamed_roles
from autocompress.models.reads import as_read, reads_of
from autocompress.spaces import load_space
from autocompress.testing.tiny_models import tiny_batches

SIZES = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 320, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 320, "rotary_dim": 8}
POSITIONS = {"pos_att_type": ["c2p", "p2c"], "relative_attention": True}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 2,
}  # fmt: skip
ATTENTION = ("query", "key", "value", "output")
IN_BLOCK = {
    "ModernBert": ("MaskedLM", SIZES | {"cls_token_id": 1, "sep_token_id": 2},
                   ("qkv", "output", "gate_up", "down")),
    "Deberta": ("MaskedLM", SIZES | POSITIONS, ("qkv", "other", "other", "output", "up", "down")),
    "DebertaV2": ("MaskedLM", SIZES | POSITIONS | {"share_att_key": True},
                  (*ATTENTION, "up", "down")),
    "Albert": ("MaskedLM", SIZES | {"embedding_size": 32}, (*ATTENTION, "up", "down")),
    "GPTJ": ("CausalLM", GPT, (*ATTENTION, "up", "down")),
    "CodeGen": ("CausalLM", GPT, ("qkv", "output", "up", "down")),
    "Lfm2": ("CausalLM", SIZES | {"full_attn_idxs": [0], "num_key_value_heads": 2},
             (*ATTENTION, "gate", "up", "down")),
    "DeepseekV3": ("CausalLM", SIZES | LATENT | {"q_lora_rank": 16},
                   (*["qkv"] * 4, "output", "gate", "up", "down")),
    "PvtV2": ("ImageClassification", {"depths": [1] * 4},
              (*ATTENTION, "up", "down")),
}  # fmt: skip


def built(name):
    head, settings, _ = IN_BLOCK[name]
    auto = getattr(hf, f"AutoModelFor{head}")
    torch.manual_seed(0)
    return separate_experts(auto.from_config(getattr(hf, f"{name}Config")(**settings)).eval())


@pytest.mark.parametrize("name", IN_BLOCK)
def test_layers_of_a_block_have_their_roles(name):
    with torch.device("meta"):
        layout = describe(built(name))
    assert Counter(x.role for x in layout.layers if x.block == 0) == Counter(IN_BLOCK[name][2])
    assert unnamed_roles(layout) == ""


def test_halves_of_a_low_rank_projection_share_no_input():
    with torch.device("meta"):
        layers = describe(built("DeepseekV3")).layers
    assert all(x.input_name == x.name for x in layers if x.role == "qkv")


@pytest.mark.parametrize("name", ["ModernBert", "DebertaV2", "GPTJ"])
def test_shipped_spaces_offer_them_low_bits(name):
    with torch.device("meta"):
        layout = describe(built(name))
    space = load_space("mixed_precision", layout.layers)
    bits = {c.name: [o.label for o in c.options] for c in space.choices}
    inside = [c.name for c in space.choices if layout.layer(c.layers[0]).block is not None]
    assert all(any("bits=2" in label for label in bits[choice]) for choice in inside)


def test_a_projection_that_also_reads_positions_shares_no_statistics_with_one_that_does_not(
    tmp_path,
):
    model = built("DebertaV2").requires_grad_(False)
    batch = tiny_batches("bert")[0]
    assumed = describe(model)
    layout = as_read(assumed, reads_of(model, assumed, batch))
    query, key, value = (x for x in layout.layers if x.block == 0 and x.role in ATTENTION[:3])
    assert query.input_name == key.input_name == query.name
    assert value.input_name == value.name
    store = CurvatureStore(tmp_path)
    collect_curvature(model, layout, [batch], logits_loss, store)
    assert all(store.get(x).rows.sum() > 0 for x in (query, key, value))


def logits_loss(module, batch, generator):
    logits = module(**batch).logits
    return (logits * torch.randn(logits.shape, generator=generator)).sum(), logits[..., 0].numel()


def test_blocks_of_layers_without_a_role_are_worth_a_line():
    config = hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=8)
    with torch.device("meta"):
        said = unnamed_roles(describe(hf.MambaForCausalLM(config)))
    assert said.startswith("72% of the weights in the blocks")
    assert "(*.mixer.in_proj, *.mixer.x_proj, *.mixer.dt_proj)" in said
    assert "`layers:`" in said
