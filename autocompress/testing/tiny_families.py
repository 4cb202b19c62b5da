"""Configurations of the tiny models: one entry per supported family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as hf
from torch import nn

PAD, BOS, EOS, UNK, MASK = range(5)
IMAGE_SIZE = 8
N_CLASSES = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shape of a tiny model. `heads` divides `hidden`, `key_value_heads` divides `heads`."""

    hidden: int = 64
    intermediate: int = 96
    blocks: int = 2
    heads: int = 4
    key_value_heads: int = 2
    vocabulary: int = 320
    positions: int = 256
    experts: int = 4


@dataclass(frozen=True, slots=True)
class Family:
    """How to build a tiny model, and the name of the Auto class that loads it."""

    auto_class: str
    build: Callable[[Sizes], nn.Module]


def _decoder(sizes: Sizes) -> dict[str, Any]:
    return {
        **_encoder(sizes),
        "num_key_value_heads": sizes.key_value_heads,
        "head_dim": sizes.hidden // sizes.heads,
    }


def _encoder(sizes: Sizes) -> dict[str, Any]:
    return {
        **_tokens(sizes),
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.blocks,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.positions,
    }


def _tokens(sizes: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocabulary,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def _gemma3(sizes: Sizes) -> nn.Module:
    scale = sizes.hidden // sizes.heads
    model: nn.Module = hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **_decoder(sizes),
            query_pre_attn_scalar=scale,
            sliding_window=16,
            layer_types=["sliding_attention", *["full_attention"] * (sizes.blocks - 1)],
        )
    )
    return model


def _mixtral(sizes: Sizes) -> nn.Module:
    model: nn.Module = hf.MixtralForCausalLM(
        hf.MixtralConfig(**_decoder(sizes), num_local_experts=sizes.experts, num_experts_per_tok=2)
    )
    return model


def _gpt2(sizes: Sizes) -> nn.Module:
    model: nn.Module = hf.GPT2LMHeadModel(
        hf.GPT2Config(
            **_tokens(sizes),
            n_embd=sizes.hidden,
            n_inner=sizes.intermediate,
            n_layer=sizes.blocks,
            n_head=sizes.heads,
            n_positions=sizes.positions,
        )
    )
    return model


def _distilbert(sizes: Sizes) -> nn.Module:
    model: nn.Module = hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            **_tokens(sizes),
            dim=sizes.hidden,
            hidden_dim=sizes.intermediate,
            n_layers=sizes.blocks,
            n_heads=sizes.heads,
            max_position_embeddings=sizes.positions,
            num_labels=N_CLASSES,
        )
    )
    return model


def _vit(sizes: Sizes) -> nn.Module:
    model: nn.Module = hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.blocks,
            num_attention_heads=sizes.heads,
            image_size=IMAGE_SIZE,
            patch_size=2,
            num_labels=N_CLASSES,
        )
    )
    return model


def _bart(sizes: Sizes) -> nn.Module:
    model: nn.Module = hf.BartForConditionalGeneration(
        hf.BartConfig(
            **_tokens(sizes),
            d_model=sizes.hidden,
            encoder_layers=sizes.blocks,
            decoder_layers=sizes.blocks,
            encoder_attention_heads=sizes.heads,
            decoder_attention_heads=sizes.heads,
            encoder_ffn_dim=sizes.intermediate,
            decoder_ffn_dim=sizes.intermediate,
            max_position_embeddings=sizes.positions,
            decoder_start_token_id=EOS,
            forced_eos_token_id=EOS,
        )
    )
    return model


def _t5(sizes: Sizes, feed_forward: str) -> nn.Module:
    model: nn.Module = hf.T5ForConditionalGeneration(
        hf.T5Config(
            **_tokens(sizes),
            d_model=sizes.hidden,
            d_kv=sizes.hidden // sizes.heads,
            d_ff=sizes.intermediate,
            num_layers=sizes.blocks,
            num_heads=sizes.heads,
            feed_forward_proj=feed_forward,
            decoder_start_token_id=PAD,
        )
    )
    return model


TINY_FAMILIES: dict[str, Family] = {
    "llama": Family(
        "AutoModelForCausalLM", lambda s: hf.LlamaForCausalLM(hf.LlamaConfig(**_decoder(s)))
    ),
    "qwen2": Family(
        "AutoModelForCausalLM",
        lambda s: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_decoder(s), tie_word_embeddings=True)),
    ),
    "qwen3": Family(
        "AutoModelForCausalLM",
        lambda s: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_decoder(s), tie_word_embeddings=True)),
    ),
    "mistral": Family(
        "AutoModelForCausalLM", lambda s: hf.MistralForCausalLM(hf.MistralConfig(**_decoder(s)))
    ),
    "mixtral": Family("AutoModelForCausalLM", _mixtral),
    "gemma3": Family("AutoModelForCausalLM", _gemma3),
    "gpt2": Family("AutoModelForCausalLM", _gpt2),
    "bert": Family(
        "AutoModelForMaskedLM", lambda s: hf.BertForMaskedLM(hf.BertConfig(**_encoder(s)))
    ),
    "bert-classifier": Family(
        "AutoModelForSequenceClassification",
        lambda s: hf.BertForSequenceClassification(
            hf.BertConfig(**_encoder(s), num_labels=N_CLASSES)
        ),
    ),
    "bert-encoder": Family("AutoModel", lambda s: hf.BertModel(hf.BertConfig(**_encoder(s)))),
    "roberta": Family(
        "AutoModelForMaskedLM", lambda s: hf.RobertaForMaskedLM(hf.RobertaConfig(**_encoder(s)))
    ),
    "distilbert": Family("AutoModelForSequenceClassification", _distilbert),
    "vit": Family("AutoModelForImageClassification", _vit),
    "bart": Family("AutoModelForSeq2SeqLM", _bart),
    "t5": Family("AutoModelForSeq2SeqLM", lambda s: _t5(s, "relu")),
    "t5-gated": Family("AutoModelForSeq2SeqLM", lambda s: _t5(s, "gated-gelu")),
}
