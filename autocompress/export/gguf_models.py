"""The architectures that GGUF files are written for: names, metadata and layout of tensors.

What llama.cpp expects of a file, per architecture: the metadata keys that describe the model; query
and key rows of the llama architecture in interleaved rotary order; gemma's norms as ``1 + weight``;
the scaling of llama 3 rotary frequencies as a tensor of divisors. Whatever a config says that the
architecture's code in llama.cpp does not compute is refused, so that a file never loads and answers
wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.core.errors import nearest

_ROPE_TYPES = ("default", "linear")
_GEMMA_PATTERN = 6  # llama.cpp takes every sixth layer as global unless the file says otherwise
_GEMMA_27B_BLOCKS = 62  # the depth at which llama.cpp scales attention by width / heads


@dataclass(frozen=True, slots=True)
class Architecture:
    """How an architecture lies in a file.

    Attributes:
        ggml: its name in GGUF.
        activation: the one that llama.cpp computes.
        norm_shift: what is added to the weights of norms.
        rotates_rows: query and key rows are in interleaved rotary order.
        rope_types: scalings of rotary frequencies that can be said.
        demands: settings of the config that llama.cpp takes for granted.
    """

    ggml: str
    activation: str
    norm_shift: float = 0.0
    rotates_rows: bool = False
    rope_types: tuple[str, ...] = _ROPE_TYPES
    demands: tuple[tuple[str, Any], ...] = ()


_LLAMA = Architecture("llama", "silu", rotates_rows=True, rope_types=(*_ROPE_TYPES, "llama3"))
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", "silu"),
    "qwen3": Architecture("qwen3", "silu", demands=(("attention_bias", False),)),
    "gemma3_text": Architecture(
        "gemma3",
        "gelu_pytorch_tanh",
        norm_shift=1.0,
        demands=(
            ("attention_bias", False), ("attn_logit_softcapping", None),
            ("use_bidirectional_attention", False),
        ),
    ),
    "gpt2": Architecture(
        "gpt2",
        "gelu_new",
        rope_types=(),
        demands=(
            ("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
            ("add_cross_attention", False),
        ),
    ),
}  # fmt: skip
"""By the `model_type` of a transformers config."""


def model_refusal(module: nn.Module) -> str:
    """Why no file can be written for a model: the rule, what was got, what is legal; else empty."""
    config: Any = module.config
    kind = str(getattr(config, "model_type", type(module).__name__))
    if kind not in ARCHITECTURES:
        return f"files are written for some architectures, but got {kind!r}. " + nearest(
            kind, ARCHITECTURES
        )
    architecture = ARCHITECTURES[kind]
    return (
        _setting_refusal(config, architecture)
        or _rope_refusal(config, architecture)
        or _tensor_refusal(module, architecture)
    )


def tensor_names(module: nn.Module) -> dict[str, str]:
    """Name in the file of each stored tensor of the module; empty where GGUF has none.

    Of tied tensors only the first is named, which is the one that transformers saves.
    """
    import gguf

    config: Any = module.config
    ggml = ARCHITECTURES[config.model_type].ggml
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ggml)
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    seen: set[int] = set()
    names: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        names[name] = known.get_name(name, try_suffixes=(".weight", ".bias")) or ""
    return names


def stored_rows(name: str, n_rows: int, config: Any) -> Tensor | None:
    """The order in which the file keeps the rows of tensor `name`, (n_rows,); None: as they are."""
    architecture = ARCHITECTURES[config.model_type]
    heads = {"attn_q": config.num_attention_heads, "attn_k": _kv_heads(config)}
    part = name.split(".")[-2] if name.count(".") else name
    if not architecture.rotates_rows or part not in heads:
        return None
    halves = torch.arange(n_rows).view(heads[part], 2, -1)
    return halves.transpose(1, 2).reshape(-1)


def plain_tensor(name: str, tensor: Tensor, config: Any) -> Tensor:
    """A tensor that is no layer's weight (norm, bias, positions) as the file keeps it, float32."""
    shift = ARCHITECTURES[config.model_type].norm_shift
    values = tensor.detach().float()
    if shift and name.endswith("norm.weight"):
        values = values + shift
    rows = stored_rows(name, len(values), config)
    return values if rows is None else values[rows]


def extra_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that the file has and the module has not, float32."""
    config: Any = module.config
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        width = _head_dim(config)
        plain = rope["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
        scaled = next(b for n, b in module.named_buffers() if n.endswith("rotary_emb.inv_freq"))
        yield "rope_freqs.weight", (plain / scaled.double()).float()


def add_metadata(writer: Any, config: Any) -> None:
    """Describe the model to a `gguf.GGUFWriter` of its architecture."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_feed_forward(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(_kv_heads(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    _add_rope(writer, config)
    if config.model_type == "gemma3_text":
        _add_gemma(writer, config)


def _add_rope(writer: Any, config: Any) -> None:
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_gemma(writer: Any, config: Any) -> None:
    local = [kind == "sliding_attention" for kind in config.layer_types]
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if not any(local):
        return
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if local != [bool((i + 1) % _GEMMA_PATTERN) for i in range(len(local))]:
        writer.add_sliding_window_pattern(local)


def _setting_refusal(config: Any, architecture: Architecture) -> str:
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", "")
    activation = getattr(config, "hidden_activation", None) or activation
    found: list[tuple[str, Any, Any]] = [("activation", architecture.activation, activation)]
    found += [(n, v, getattr(config, n, v)) for n, v in architecture.demands]
    if architecture.ggml == "gemma3":
        wide = config.num_hidden_layers == _GEMMA_27B_BLOCKS
        width = config.hidden_size // config.num_attention_heads if wide else _head_dim(config)
        found.append(("query_pre_attn_scalar", width, config.query_pre_attn_scalar))
    wrong = next(((n, v, got) for n, v, got in found if (v or False) != (got or False)), None)
    if wrong is None:
        return ""
    name, value, got = wrong
    return f"llama.cpp computes {architecture.ggml} models with {name} {value}, but got {got}."


def _rope_refusal(config: Any, architecture: Architecture) -> str:
    if not architecture.rope_types:
        return ""
    parts = {"full_attention": _rope(config)}
    if architecture.ggml == "gemma3":
        parts["sliding_attention"] = config.rope_parameters["sliding_attention"]
    for part, rope in parts.items():
        legal = architecture.rope_types if part == "full_attention" else ("default",)
        kind = rope.get("rope_type", "default")
        if kind not in legal:
            return (
                f"the rotary frequencies of {architecture.ggml} models may be "
                f"{' or '.join(legal)}, but those of {part} are {kind!r}."
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return f"heads must be rotated whole, but got {rope['partial_rotary_factor']} of them."
    return ""


def _tensor_refusal(module: nn.Module, architecture: Architecture) -> str:
    missing = [name for name, stored in tensor_names(module).items() if not stored]
    if not missing:
        return ""
    return (
        f"every tensor must have a name in the architecture {architecture.ggml!r}, but "
        f"{missing[0]} has none ({len(missing)} in all)."
    )


def _rope(config: Any) -> Mapping[str, Any]:
    """Rotary parameters of the layers that attend to everything."""
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    inner: Mapping[str, Any] = found.get("full_attention", found)
    return inner


def _context_length(config: Any) -> int:
    """Positions; of a model all of whose windows slide, those for which that makes no difference.

    Only the gemma architecture can say that attention is local.
    """
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if config.model_type == "gemma3_text" or not window or "sliding_attention" not in kinds:
        return longest
    return min(longest, int(window))


def _head_dim(config: Any) -> int:
    found = getattr(config, "head_dim", None)
    return int(found or config.hidden_size // config.num_attention_heads)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _feed_forward(config: Any) -> int:
    if config.model_type == "gpt2":
        return int(config.n_inner or 4 * config.n_embd)
    return int(config.intermediate_size)
