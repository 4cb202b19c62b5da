import json
from collections import Counter

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from autocompress.core.errors import ModelError
from autocompress.models import ModelLayout, describe
from autocompress.testing.tiny_models import FAMILIES, Sizes, tiny_batches, tiny_model

_ATTENTION = ("query", "key", "value", "output")

SELF_ATTENTION = ("query", "key", "value", "output")
CROSS_ATTENTION = ("cross_query", "cross_key", "cross_value", "cross_output")
DECODER = (*SELF_ATTENTION, "gate", "up", "down")
MIXTURE = (*SELF_ATTENTION, *("gate_up", "down") * 4)
ENCODER = (*SELF_ATTENTION, "up", "down")
CROSS_DECODER = (*SELF_ATTENTION, *CROSS_ATTENTION, "up", "down")

# Roles of each block, then of what lies outside the blocks.
EXPECTED = {
    "llama": ([DECODER] * 2, ["embedding", "head"]),
    "mistral": ([DECODER] * 2, ["embedding", "head"]),
    "mixtral": ([MIXTURE] * 2, ["embedding", "head"]),
    "qwen2": ([DECODER] * 2, ["embedding"]),
    "qwen3": ([DECODER] * 2, ["embedding"]),
    "gemma3": ([DECODER] * 2, ["embedding"]),
    "gpt2": ([("qkv", "output", "up", "down")] * 2, ["embedding", "position"]),
    "bert": ([ENCODER] * 2, ["embedding", "position", "other"]),
    "bert-classifier": ([ENCODER] * 2, ["embedding", "position", "other", "head"]),
    "bert-encoder": ([ENCODER] * 2, ["embedding", "position", "other"]),
    "roberta": ([ENCODER] * 2, ["embedding", "position", "other"]),
    "distilbert": ([ENCODER] * 2, ["embedding", "position", "other", "head"]),
    "vit": ([ENCODER] * 2, ["head"]),
    "bart": ([ENCODER] * 2 + [CROSS_DECODER] * 2, ["embedding"]),
    "t5": ([ENCODER] * 2 + [CROSS_DECODER] * 2, ["embedding"]),
    "t5-gated": (
        [DECODER] * 2 + [(*SELF_ATTENTION, *CROSS_ATTENTION, "gate", "up", "down")] * 2,
        ["embedding"],
    ),
}
TIED = {
    "qwen2": ("lm_head",),
    "qwen3": ("lm_head",),
    "gemma3": ("lm_head",),
    "gpt2": ("lm_head",),
    "bert": ("cls.predictions.decoder",),
    "roberta": ("lm_head.decoder",),
    "bart": ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    "t5": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
    "t5-gated": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
}


def test_every_family_shows_the_roles_of_its_blocks_and_ends(family, model):
    layout = describe(model)
    blocks, outside = EXPECTED[family]
    assert len(layout.blocks) == len(blocks)
    for index, roles in enumerate(blocks):
        found = Counter(layer.role for layer in layout.layers if layer.block == index)
        assert found == Counter(roles)
    assert [layer.role for layer in layout.layers if layer.block is None] == outside


def test_every_linear_module_is_exactly_one_layer(model):
    layout = describe(model)
    named = [name for layer in layout.layers for name in (layer.name, *layer.aliases)]
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert len(named) == len(set(named))
    assert linear <= set(named)


def test_bytes_of_layers_and_the_rest_are_the_bytes_of_the_saved_file(family, saved, model):
    with safe_open(saved(family) / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    stored = sum(t.numel() * t.element_size() for t in tensors)
    layout = describe(model)
    assert layout.base_bytes == stored
    assert layout.other_bytes == stored - sum(layer.base_bytes for layer in layout.layers)


# transformers 5 saves ViT under the names that it had in version 4.
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"vit", "mixtral"}))
def test_layers_carry_the_name_under_which_the_file_holds_their_tensor(family, saved, model):
    with safe_open(saved(family) / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert {f"{layer.name}.weight" for layer in describe(model).layers} <= stored


def test_a_tied_tensor_is_one_layer_that_costs_what_the_head_computes(family, model):
    embeddings = [layer for layer in describe(model).layers if layer.role == "embedding"]
    for layer in embeddings:
        head = next((alias for alias in layer.aliases if "embed_tokens" not in alias), None)
        assert layer.aliases == TIED.get(family, ())
        assert layer.input_name == head
        assert layer.macs_per_token == (layer.n_weights if head else 0)
    assert len(embeddings) == (0 if family == "vit" else 1)


def test_layers_share_an_input_name_exactly_if_they_read_the_same_tensor(family, model):
    layout = describe(model)
    seen = {}
    kept = []  # alive, so that no address is used twice

    def remember(name):
        def hook(_, arguments):
            kept.append(arguments[0])
            seen[name] = arguments[0].data_ptr()

        return hook

    readers = [layer for layer in layout.layers if layer.input_name is not None]
    for layer in readers:
        reader = layer.name if layer.role != "embedding" else layer.input_name
        model.get_submodule(reader).register_forward_pre_hook(remember(layer.name))
    with torch.no_grad():
        model(**tiny_batches(family)[0])
    for a in readers:
        for b in readers:
            assert (a.input_name == b.input_name) == (seen[a.name] == seen[b.name]), (a, b)


def test_an_input_is_named_after_a_layer_that_reads_it(model):
    layout = describe(model)
    modules = dict(model.named_modules())
    for layer in layout.layers:
        if layer.input_name is not None:
            assert isinstance(modules[layer.input_name], nn.Linear | Conv1D)


def test_cross_attention_of_all_decoder_blocks_shares_the_encoder_output():
    layout = describe(tiny_model("t5"))
    shared = {x.input_name for x in layout.layers if x.role in ("cross_key", "cross_value")}
    assert len(shared) == 1


def test_layers_of_attention_know_their_heads(family, model):
    layout = describe(model)
    sizes = Sizes()
    of_role = {role: {x.heads for x in layout.layers if x.role == role} for role in _ATTENTION}
    assert of_role["output"] == {sizes.heads}
    assert of_role["query"] <= {sizes.heads}  # none if it is one with key and value
    assert of_role["key"] == of_role["value"] <= {sizes.heads, sizes.key_value_heads}
    assert all(x.heads is None for x in layout.layers if x.role in {"up", "down", "embedding"})


def test_shapes_are_out_by_in_also_for_conv1d():
    layer = describe(tiny_model("gpt2")).layer("transformer.h.0.attn.c_attn")
    assert (layer.kind, layer.out_features, layer.in_features) == ("conv1d", 192, 64)


def test_a_layout_survives_json(model):
    layout = describe(model)
    assert ModelLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_a_model_without_weights_in_memory_has_the_same_layout(family, model):
    with torch.device("meta"):
        empty = tiny_model(family)
    assert describe(empty) == describe(model)


def test_patches_cost_their_convolution():
    assert describe(tiny_model("vit")).other_macs_per_token == 64 * 3 * 2 * 2
    assert describe(tiny_model("llama")).other_macs_per_token == 0


def test_bytes_follow_the_dtype():
    half = describe(tiny_model("llama").to(torch.bfloat16))
    assert half.layers[0].dtype == "bfloat16"
    assert half.base_bytes * 2 == describe(tiny_model("llama")).base_bytes


def test_one_block_is_enough():
    assert describe(tiny_model("t5", sizes=Sizes(blocks=1))).blocks == (
        "encoder.block.0",
        "decoder.block.0",
    )


def test_the_classifier_of_a_causal_model_is_its_head():
    config = tiny_model("llama").config
    layout = describe(hf.LlamaForSequenceClassification(config))
    assert layout.layer("score").role == "head"


def test_an_unknown_layer_is_answered_with_the_nearest_name():
    layout = describe(tiny_model("qwen2"))
    with pytest.raises(ModelError, match=r"Did you mean 'model\.layers\.0\.mlp\.up_proj'"):
        layout.layer("model.layers.0.mlp.up_prj")
    with pytest.raises(ModelError, match=r"Use 'model\.embed_tokens'"):
        layout.layer("lm_head")


def jamba():
    config = hf.JambaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, num_experts=1, attn_layer_period=2,
        attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.JambaForCausalLM(config).eval()


def test_blocks_of_two_classes_are_blocks_of_one_stack():
    model = jamba()
    assert len({type(block) for block in model.model.layers}) == 2
    layout = describe(model)
    assert layout.blocks == tuple(f"model.layers.{i}" for i in range(4))
    of_block = [{x.role for x in layout.layers if x.block == i} for i in range(4)]
    assert of_block[0] == of_block[2] == {"other", "output", "gate", "up", "down"}
    assert of_block[1] == of_block[3] == set(DECODER)


def test_a_part_list_of_several_classes_inside_a_block_is_not_taken_for_blocks():
    assert describe(tiny_model("t5")).blocks[0] == "encoder.block.0"


def test_blocks_of_a_class_without_a_projection_are_named():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

    model = nn.Sequential()
    model.layers = nn.ModuleList([Pooled(), Attentive()])
    with pytest.raises(ModelError, match=r"but in 'layers' of Sequential some, Pooled, hold no"):
        describe(model)


def test_an_empty_list_is_no_list_of_blocks():
    model = nn.Sequential()
    model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="none was found in Sequential"):
        describe(model)


def test_a_module_without_blocks_is_refused():
    with pytest.raises(ModelError, match="none was found in Sequential"):
        describe(nn.Sequential(nn.Linear(4, 4)))
