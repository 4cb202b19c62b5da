import json

import numpy as np
import pytest
import torch

from autocompress.core.errors import ModelError, RunDirectoryError
from autocompress.models import load_base_model
from autocompress.models.gguf import dequantize_gguf
from autocompress.testing.tiny_models import tiny_model, tiny_tokenizer

# transformers' names of a Qwen 2 block and those of GGUF.
BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, model, leave_out=""):
    """Write a tiny Qwen 2 as llama.cpp would: matrices in Q8_0, norms in float32."""
    gguf = pytest.importorskip("gguf", reason="GGUF is read with the demo extra")
    pytest.importorskip("accelerate", reason="GGUF is read with the demo extra")
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    bpe = json.loads(tiny_tokenizer("qwen2").backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3] * 5 + [1] * (len(bpe["vocab"]) - 5))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    expected = {}
    for ours, theirs in names(config.num_hidden_layers).items():
        if theirs == leave_out:
            continue
        value = model.get_parameter(ours).detach().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if value.ndim == 2 else None
        if kind is None:
            writer.add_tensor(theirs, value)
        else:
            packed = gguf.quants.quantize(value, kind)
            writer.add_tensor(theirs, packed, raw_dtype=kind)
            value = gguf.quants.dequantize(packed, kind)
        expected[ours] = torch.from_numpy(np.array(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def names(n_blocks):
    result = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for index in range(n_blocks):
        for ours, theirs in BLOCK.items():
            result[f"model.layers.{index}.{ours}.weight"] = f"blk.{index}.{theirs}.weight"
            if theirs in ("attn_q", "attn_k", "attn_v"):
                result[f"model.layers.{index}.{ours}.bias"] = f"blk.{index}.{theirs}.bias"
    return result


def test_a_gguf_file_becomes_a_base_model_of_exactly_its_values(tmp_path):
    expected = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"))
    folder = dequantize_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")
    base = load_base_model(str(folder), "AutoModelForCausalLM")
    for name, value in expected.items():
        assert torch.equal(base.module.get_parameter(name), value), name
    assert base.layout.layer("model.embed_tokens").aliases == ("lm_head",)
    ids = base.processor("def f(x):")["input_ids"]
    assert base.processor.decode(ids, skip_special_tokens=True) == "def f(x):"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"), leave_out="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj\.weight"):
        dequantize_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


def test_a_missing_file_is_answered_with_its_neighbours(tmp_path):
    with pytest.raises(ModelError, match=r"GGUF file .*none\.gguf does not exist"):
        dequantize_gguf(tmp_path / "none.gguf", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04"])
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="A GGUF file starts with b'GGUF'"):
        dequantize_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_a_truncated_file_leaves_nothing_behind(tmp_path):
    pytest.importorskip("gguf", reason="GGUF is read with the demo extra")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ModelError, match="cannot be read as a causal language model"):
        dequantize_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_an_output_folder_that_is_not_empty_is_kept(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(RunDirectoryError, match="must be new or empty"):
        dequantize_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
