from __future__ import annotations

import pytest
import torch
import transformers as hf

from autocompress.core import derived_seed
from autocompress.core.errors import ModelError
from autocompress.methods.hadamard import rotated
from autocompress.models.layout import describe
from autocompress.models.loading import BaseModel, model_digest
from autocompress.models.residual_stream import find_residual_stream
from autocompress.models.rotation import _Basis, in_dtype, rotated_base
from autocompress.models.weights import assert_untouched, version_counters, weight_matrix
from autocompress.testing.tiny_models import Sizes, auto_class_of, tiny_model

# 48 = 16 * 3: no power of two. Heads of 12 = 4 * 3.
ODD = Sizes(hidden=48, intermediate=80)
DECODER = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip


def based(module: torch.nn.Module, auto_class: str = "AutoModelForCausalLM") -> BaseModel:
    """The module with gains and biases that are not those of an untrained model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise.to(parameter))
    module.requires_grad_(False).eval()
    return BaseModel(module, describe(module), None, "tiny", auto_class, model_digest(module))


def logits(module: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(module.config.vocab_size, (2, 12), generator=generator)
    with torch.no_grad():
        return module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def tied_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**DECODER, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    return hf.LlamaForCausalLM(config)


def built(name: str, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**(DECODER | more)))


LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2, "n_routed_experts": 4,
    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
}  # fmt: skip

KEPT = {
    "llama": lambda: tiny_model("llama", sizes=ODD),
    "llama, tied, biases everywhere": tied_llama,
    "qwen2, biased queries, tied": lambda: tiny_model("qwen2"),
    "qwen3, norms of queries and keys": lambda: tiny_model("qwen3", sizes=ODD),
    "mistral": lambda: tiny_model("mistral"),
    "gemma, gains of 1 + weight, scaled embeddings": lambda: built("Gemma"),
    "granite, scaled residuals": lambda: built("Granite", residual_multiplier=0.5),
    "phi3, fused queries, keys and values": lambda: built("Phi3"),
    "gpt2, LayerNorm with biases, positions, a head without bias": lambda: tiny_model("gpt2"),
    "cohere, LayerNorm, attention beside feed-forward": lambda: built("Cohere"),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_function_stays_and_the_given_model_too(name):
    base = based(KEPT[name]())
    wanted, before = logits(base.module), version_counters(base.module)
    turned = rotated_base(base, seed=3)
    found = logits(turned.module)
    assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))
    assert_untouched(base.module, before)
    assert turned.digest == model_digest(turned.module) != base.digest
    blocks = [layer for layer in turned.layout.layers if layer.block is not None]
    assert blocks
    for layer in blocks:
        old = base.layout.layer(layer.name)
        assert old.base_bytes == layer.base_bytes
        new_weight = weight_matrix(turned.module, layer)
        assert not torch.allclose(new_weight, weight_matrix(base.module, old), atol=1e-3)


def test_gains_become_ones_and_weights_the_textbook_products():
    base = based(tiny_model("llama", sizes=ODD))
    module, turned = base.module.model, rotated_base(base, seed=3).module.model
    width, head = ODD.hidden, ODD.hidden // ODD.heads
    q = rotated(torch.eye(width).double(), derived_seed("rotation", "stream", 3))
    r = rotated(torch.eye(head).double(), derived_seed("rotation", "head", 3))
    assert torch.allclose(q @ q.T, torch.eye(width).double(), atol=1e-12)
    old, new = module.layers[1], turned.layers[1]
    gain = torch.diag(old.input_layernorm.weight.double())
    after = torch.diag(old.post_attention_layernorm.weight.double())
    values = torch.block_diag(*[r] * ODD.key_value_heads)
    heads = torch.block_diag(*[r] * ODD.heads)
    attention, fed = old.self_attn, old.mlp
    for found, expected in (
        (turned.embed_tokens, module.embed_tokens.weight.double() @ q),
        (new.self_attn.q_proj, attention.q_proj.weight.double() @ gain @ q),
        (new.self_attn.v_proj, values.T @ attention.v_proj.weight.double() @ gain @ q),
        (new.self_attn.o_proj, q.T @ attention.o_proj.weight.double() @ heads),
        (new.mlp.gate_proj, fed.gate_proj.weight.double() @ after @ q),
        (new.mlp.down_proj, q.T @ fed.down_proj.weight.double()),
    ):
        assert torch.allclose(found.weight.double(), expected, atol=1e-6)
    norms = [m.weight for n, m in turned.named_modules() if n.endswith("norm")]
    assert len(norms) == 5
    assert all(bool((weight == 1).all()) for weight in norms)


def test_a_tied_head_is_untied_and_its_bytes_count(tmp_path):
    base = based(tied_llama())
    turned = rotated_base(base)
    table = base.layout.layer("model.embed_tokens")
    assert table.aliases == ("lm_head",)
    assert turned.layout.base_bytes == base.layout.base_bytes + table.base_bytes
    assert turned.layout.layer("lm_head").role == "head"
    assert turned.module.config.tie_word_embeddings is False
    assert base.module.config.tie_word_embeddings is True
    turned.module.save_pretrained(tmp_path)
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.lm_head.weight is not stock.model.embed_tokens.weight
    assert torch.equal(logits(stock), logits(turned.module))
    assert model_digest(stock) == turned.digest


def test_equal_seeds_give_equal_models():
    base = based(tiny_model("mistral"))
    assert rotated_base(base, seed=1).digest == rotated_base(base, seed=1).digest
    assert rotated_base(base, seed=1).digest != rotated_base(base, seed=2).digest


def test_a_copy_in_another_dtype_holds_the_rounded_weights():
    turned = rotated_base(based(tied_llama().bfloat16()))
    exact = in_dtype(turned.module, torch.float32)
    for name, parameter in turned.module.named_parameters():
        assert torch.equal(exact.get_parameter(name), parameter.float())
    assert exact.get_parameter("lm_head.weight").dtype == torch.float32
    assert next(turned.module.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [1, 2, 7, 48])
def test_the_basis_of_a_layer_norm_keeps_the_mean(width):
    q = _Basis(width, seed=5, keeps_mean=True)(torch.eye(width).double())
    ones = torch.ones(1, width).double()
    assert torch.allclose(q @ q.T, torch.eye(width).double(), atol=1e-12)
    assert torch.allclose(ones @ q, ones, atol=1e-12)


def test_subtracting_the_mean_embedding_would_change_an_rms_norm_model():
    base = based(tiny_model("llama"))
    turned = rotated_base(base)
    table = turned.module.model.embed_tokens.weight
    table += 0.02  # rows whose mean is not zero, as trained ones have
    wanted = logits(turned.module)
    table -= table.mean(-1, keepdim=True)
    assert (logits(turned.module) - wanted).norm() > 0.05 * wanted.norm()


def test_second_halves_of_low_rank_attention_do_not_meet_the_stream():
    base = based(built("DeepseekV3", **LATENT))
    turned = rotated_base(base)
    wanted = logits(base.module)
    assert torch.allclose(logits(turned.module), wanted, atol=2e-5 * float(wanted.abs().max()))
    for name, is_turned in (("q_a_proj", True), ("q_b_proj", False), ("kv_b_proj", False)):
        layer = base.layout.layer(f"model.layers.0.self_attn.{name}")
        same = torch.equal(weight_matrix(turned.module, layer), weight_matrix(base.module, layer))
        assert same != is_turned


def kurtosis(matrix: torch.Tensor) -> float:
    centred = matrix - matrix.mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2)


def rounded(module: torch.nn.Module) -> torch.nn.Module:
    """Every layer of the blocks rounded to 4 bits, one scale per row."""
    module = in_dtype(module, torch.float32)
    for layer in describe(module).layers:
        if layer.block is not None:
            weight = module.get_submodule(layer.name).weight
            scale = weight.abs().amax(1, keepdim=True) / 7
            weight.copy_((weight / scale).round() * scale)
    return module


READERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)


def test_outliers_in_weights_spread_and_four_bits_hurt_less():
    base = based(tiny_model("llama"))
    readers = [b.get_submodule(name) for b in base.module.model.layers for name in READERS]
    for reader in readers:
        reader.weight[:, :4] *= 8
    turned = rotated_base(base)
    new_readers = [b.get_submodule(name) for b in turned.module.model.layers for name in READERS]
    for old, new in zip(readers, new_readers, strict=True):
        assert kurtosis(old.weight) > 12 > 4 > kurtosis(new.weight)
    wanted = logits(base.module)
    plain = (logits(rounded(base.module)) - wanted).norm()
    assert (logits(rounded(turned.module)) - wanted).norm() < 0.6 * plain


def test_outliers_in_the_stream_spread():
    base = based(tiny_model("llama"))
    base.module.model.embed_tokens.weight[:, :4] *= 40
    for block in base.module.model.layers:
        block.self_attn.o_proj.weight[:4] *= 40
    inputs = []
    for model in (base.module, rotated_base(base).module):
        reader = model.model.layers[1].mlp.up_proj
        reader.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
        logits(model)
    before, after = map(kurtosis, inputs)
    assert before > 12 > 5 > after


REFUSED = {
    "gemma3": "post-norm: it scales what model.layers.0.self_attn.o_proj adds",
    "bert": "post-norm: bert.encoder.layer.0 takes its output as the residual stream",
    "bert-encoder": "post-norm",
    "t5": "has an encoder's too",
    "vit": "starts with token embeddings",
}


@pytest.mark.parametrize(("family", "rule"), REFUSED.items(), ids=list(REFUSED))
def test_a_model_that_cannot_be_rotated_is_refused_with_rule_and_next_step(family, rule):
    base = based(tiny_model(family), auto_class_of(family))
    with pytest.raises(ModelError, match="Next step: leave --rotate away") as refused:
        rotated_base(base)
    assert rule in str(refused.value)


def test_fused_experts_are_refused_by_their_router():
    base = based(built("Mixtral", num_local_experts=4))
    with pytest.raises(ModelError, match=r"feeds model\.layers\.0\.mlp\.gate, a Mixtral\w*Router"):
        rotated_base(base)


def test_a_norm_that_nothing_reads_is_refused():
    base = based(tiny_model("llama").model, "AutoModel")
    with pytest.raises(ModelError, match="none reads norm unchanged"):
        rotated_base(base)


def test_a_stream_that_something_else_reads_is_refused_by_its_logits():
    base = based(tiny_model("llama"))
    block = base.module.model.layers[1]
    block.mlp.register_forward_hook(lambda module, inputs, output: output.abs())
    with pytest.raises(ModelError, match=r"the logits of LlamaForCausalLM change by \d+"):
        rotated_base(base)


def test_attention_that_gates_its_values_keeps_their_basis():
    base = based(tiny_model("llama"))
    output = base.module.model.layers[0].self_attn.o_proj
    output.register_forward_pre_hook(lambda module, inputs: (inputs[0] * inputs[0].sigmoid(),))
    wanted = logits(base.module)
    assert find_residual_stream(base.module).heads
    turned = rotated_base(base)
    assert torch.allclose(logits(turned.module), wanted, atol=2e-5 * float(wanted.abs().max()))


def test_a_layer_norm_with_a_dead_channel_and_a_bias_before_a_head_without_one_is_refused():
    base = based(tiny_model("gpt2"))
    base.module.transformer.ln_f.weight[3] = 0
    with pytest.raises(ModelError, match="zero gains"):
        rotated_base(base)
