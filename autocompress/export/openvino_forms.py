"""Models in the form in which OpenVINO's frontend traces them: tensors in, tensors out.

A causal language model reads its cache of keys and values as tensors and returns them longer, and
is given its masks: ``key <= query``, within the window where a layer has one, and no padding. All
other models are called as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.pytorch_utils import Conv1D

CAUSAL = "AutoModelForCausalLM"
_MASKS = ("full_attention", "sliding_attention")
_GROWING = frozenset({"dynamic", "longrope"})
OUTPUTS = ("logits", "last_hidden_state", "pooler_output")
_FIRST_ID = 5  # below it lie the special tokens of most tokenizers


@dataclass(frozen=True, slots=True)
class Form:
    """What a model reads and writes.

    Attributes:
        inputs: names of its inputs, but for those of the cache.
        outputs: names of its outputs, but for those of the cache.
        cache: (heads, width) of the keys and of the values of each block; empty: there is none.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: tuple[tuple[int, int], ...] = ()

    @property
    def past(self) -> tuple[str, ...]:
        """Names of the cache's inputs: key and value of each block in turn."""
        return tuple(
            f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(self.cache))
        )

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the cache's outputs."""
        return tuple(name.replace("past_key_values", "present") for name in self.past)


def float32_copy(module: nn.Module) -> tuple[nn.Module, dict[int, torch.dtype]]:
    """A copy that computes in float32, and what its tensors are stored as.

    Tensors that are float32 already are shared. Layers that store their weight as (in, out) become
    linear ones.

    Returns:
        The copy, and by address of each of its parameters the dtype in `module`.
    """
    found = {id(t): t for t in chain(module.parameters(), module.buffers())}
    memo: dict[int, Any] = {}
    for key, tensor in found.items():
        values = tensor.detach()
        values = values.float() if values.is_floating_point() else values
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[key] = nn.Parameter(values, requires_grad=False) if is_parameter else values
    model: nn.Module = copy.deepcopy(module, dict(memo))
    dtypes = {memo[id(t)].data_ptr(): t.dtype for t in module.parameters() if t.is_floating_point()}
    for name, child in list(model.named_modules()):
        if isinstance(child, Conv1D):
            parent, _, leaf = name.rpartition(".")
            linear = _linear(child)
            dtypes[linear.weight.data_ptr()] = dtypes[child.weight.data_ptr()]
            setattr(model.get_submodule(parent), leaf, linear)
    return model.eval(), dtypes


def _linear(layer: Conv1D) -> nn.Linear:
    linear = nn.Linear(1, 1, device="meta")
    weight = layer.weight.detach().t().contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    linear.out_features, linear.in_features = weight.shape
    return linear


def attention_refusal(config: Any) -> str:
    """Why masks or positions of a causal model cannot be fixed in a graph; empty if they can."""
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - set(_MASKS))
    if strange:
        return (
            f"causal models must have layers of {' and '.join(_MASKS)} only, but those of "
            f"{config.model_type} are also {', '.join(strange)}."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(r["rope_type"]) for r in (rope, *rope.values()) if _is_rope(r)}
    growing = sorted(kinds & _GROWING)
    if growing:
        return (
            "rotary frequencies must be the same for texts of every length, but those of rope_type "
            f"{growing[0]} are not."
        )
    return ""


def _is_rope(value: object) -> bool:
    return isinstance(value, Mapping) and "rope_type" in value


class Plain(nn.Module):
    """A model without a cache."""

    def __init__(self, model: nn.Module, form: Form) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs of `form`, from its inputs."""
        result = self.model(**dict(zip(self.form.inputs, tensors, strict=True)))
        return tuple(result[name] for name in self.form.outputs)


class Cached(nn.Module):
    """A causal language model whose cache comes and goes as tensors."""

    def __init__(self, model: nn.Module, form: Form) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits, then keys and values of each block with those of the new tokens.

        Args:
            input_ids: (batch, new).
            attention_mask: (batch, past + new), 0 for padding.
            position_ids: (batch, new).
            past: keys and values of each block, (batch, heads, past, width).
        """
        config: Any = self.model.config
        layers = [_layer(k, v) for k, v in zip(past[::2], past[1::2], strict=True)]
        cache = Cache(layers=cast(Any, layers))
        result = self.model(
            input_ids=input_ids,
            attention_mask=_masks(attention_mask, input_ids.shape[1], config),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (result.logits, *chain.from_iterable((la.keys, la.values) for la in layers))


def _layer(keys: Tensor, values: Tensor) -> Any:
    layer: Any = DynamicLayer()
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    return layer


def _masks(padding: Tensor, n_new: int, config: Any) -> Any:
    """Additive masks (batch, 1, new, past + new), as the model wants them."""
    keys = torch.arange(padding.shape[1])
    queries = keys[padding.shape[1] - n_new :, None]
    causal = keys[None] <= queries
    window = getattr(config, "sliding_window", None)
    near = causal if window is None else causal & (keys[None] > queries - window)
    types = getattr(config, "layer_types", None)
    if types is None:
        return _additive(near, padding)
    masks = {"full_attention": causal, "sliding_attention": near}
    return {name: _additive(masks[name], padding) for name in dict.fromkeys(types)}


def _additive(allowed: Tensor, padding: Tensor) -> Tensor:
    both = allowed[None, None] & (padding[:, None, None] > 0)
    return torch.where(both, 0.0, torch.finfo(torch.float32).min)


def form_of(model: nn.Module, auto_class: str, input_names: tuple[str, ...]) -> Form:
    """What `model` reads and writes.

    Args:
        model: in float32.
        auto_class: name of the transformers Auto class that loads it.
        input_names: what its tokenizer or image processor gives.
    """
    if auto_class == CAUSAL:
        example = batch_of(model, ("input_ids",), n=1, length=2)
        with torch.no_grad():
            cache = model(**example, use_cache=True).past_key_values
        shapes = [(int(t.shape[1]), int(t.shape[3])) for la in cache.layers for t in _pair(la)]
        return Form(("input_ids", "attention_mask", "position_ids"), ("logits",), tuple(shapes))
    accepted = inspect.signature(model.forward).parameters
    inputs = tuple(name for name in input_names if name in accepted)
    with torch.no_grad():
        result = model(**batch_of(model, inputs, n=1, length=2))
    return Form(inputs, tuple(name for name in OUTPUTS if result.get(name) is not None))


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def batch_of(
    model: nn.Module, names: tuple[str, ...], *, n: int, length: int, padded: int = 0
) -> dict[str, Tensor]:
    """Inputs of the same numbers whenever it is asked for.

    Args:
        model: whose config gives vocabulary and image size.
        names: of the inputs.
        n: batch.
        length: tokens of a sequence.
        padded: tokens at the end of the last sequence that are padding.
    """
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    mask = torch.ones(n, length, dtype=torch.int64)
    mask[-1, length - padded :] = 0
    batch = {
        "attention_mask": mask,
        "token_type_ids": torch.zeros(n, length, dtype=torch.int64),
        "position_ids": torch.arange(length).expand(n, length),
    }
    if "input_ids" in names:
        ids = torch.randint(_FIRST_ID, config.vocab_size, (n, length), generator=generator)
        batch["input_ids"] = ids
    if "pixel_values" in names:
        sides = (config.num_channels, config.image_size, config.image_size)
        batch["pixel_values"] = torch.randn(n, *sides, generator=generator)
    return {name: batch[name] for name in names}


def example_of(model: nn.Module, form: Form) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module to trace, and the inputs to trace it with."""
    n, new, past = 2, 4, 3
    if not form.cache:
        batch = batch_of(model, form.inputs, n=n, length=new)
        return Plain(model, form), tuple(batch[name] for name in form.inputs)
    whole: Mapping[str, Tensor] = batch_of(model, form.inputs, n=n, length=past + new)
    caches = tuple(torch.zeros(n, heads, past, width) for heads, width in form.cache)
    ids, mask, positions = (whole[name] for name in form.inputs)
    return Cached(model, form), (ids[:, past:], mask, positions[:, past:], *caches)
