"""What a model reads in a pass that is made up: random tokens, or an image."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

CONTEXT_TOKENS = 128
"""Tokens before the one that is decoded."""


def pass_inputs(
    model: PreTrainedModel, auto_class: str, n_tokens: int
) -> Callable[[], dict[str, Any]]:
    """Makes the arguments of passes over random tokens, the same for every model.

    Args:
        model: decides what a pass reads: token ids, or an image.
        auto_class: it was loaded with.
        n_tokens: of a pass; one token is decoded after `CONTEXT_TOKENS`.
    """
    if model.main_input_name == "pixel_values":
        return partial(dict, pixel_values=_image(model))
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, CONTEXT_TOKENS + n_tokens), generator=generator)
    ids = ids.to(model.device)
    read, last = ids[:, -n_tokens:], _last_logits(model)
    if auto_class == "AutoModelForSeq2SeqLM":
        return partial(dict, input_ids=read, decoder_input_ids=read)
    if auto_class != "AutoModelForCausalLM":
        return partial(dict, input_ids=read, attention_mask=torch.ones_like(read))
    if n_tokens > 1:
        return partial(dict, input_ids=read, **last)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :CONTEXT_TOKENS], use_cache=True, **last).past_key_values
    return lambda: {"input_ids": read, "past_key_values": copy.deepcopy(cache), **last}


def _last_logits(model: PreTrainedModel) -> dict[str, int]:
    """As `generate` asks for it: no logits of tokens that are known."""
    takes_it = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if takes_it else {}


def _image(model: PreTrainedModel) -> Tensor:
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, model.config.num_channels, height, width, generator=generator)
    return pixels.to(model.device, model.dtype)
