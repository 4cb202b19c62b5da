"""Neurons and heads that nothing reads are taken out of a model that is written dense.

A config has one width for all blocks, so as many go of each block as the one that needs most of
them can spare. Whether the config then builds the very shapes that are left is tried, not taken for
granted; where it does not, the model stays as wide as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autocompress.core import LayerSpec
from autocompress.export.writing import parameter_bytes
from autocompress.models.layout import ModelLayout
from autocompress.models.weights import weight_matrix

_NEURONS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_head")
"""What configs call them."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a block: the layer that reads a width, and all those that write it."""

    reader: LayerSpec
    writers: tuple[LayerSpec, ...]
    n_units: int


def narrow(model: PreTrainedModel, layout: ModelLayout) -> int:
    """Take neurons and heads out of `model` whose columns are zero in the layers that read them.

    Args:
        model: computes with the compressed weights; its modules and its config are changed, no
            tensor is written.
        layout: of the base model.

    Returns:
        Bytes of all that was taken out.
    """
    if model.config.is_encoder_decoder:
        return 0
    before = parameter_bytes(model)
    for parts in (_feed_forwards(layout), _attentions(layout)):
        if parts is not None:
            _narrow_all(model, parts)
    return before - parameter_bytes(model)


def _feed_forwards(layout: ModelLayout) -> list[_Part] | None:
    """Of every block; None if one has none, or none with a width of its own."""
    parts = []
    for block in range(len(layout.blocks)):
        readers, writers = _of_block(layout, block, "down"), _of_block(layout, block, "gate", "up")
        if len(readers) != 1 or not writers or _of_block(layout, block, "gate_up"):
            return None
        parts.append(_Part(readers[0], writers, readers[0].in_features))
    fits = all(w.out_features == p.n_units for p in parts for w in p.writers)
    return parts if fits and not any(p.reader.expert for p in parts) else None


def _attentions(layout: ModelLayout) -> list[_Part] | None:
    """Of every block; None if one has none, or heads that cannot go one by one."""
    parts = []
    for block in range(len(layout.blocks)):
        readers = _of_block(layout, block, "output")
        writers = _of_block(layout, block, "query", "key", "value")
        heads = {x.heads for x in (*readers, *writers)}
        if len(readers) != 1 or len(writers) != 3 or None in heads:
            return None
        n_units = min(cast(set[int], heads))
        if n_units < 2 or any(cast(int, n) % n_units for n in heads):
            return None
        parts.append(_Part(readers[0], writers, n_units))
    return parts


def _of_block(layout: ModelLayout, block: int, *roles: str) -> tuple[LayerSpec, ...]:
    return tuple(x for x in layout.layers if x.block == block and x.role in roles)


def _narrow_all(model: PreTrainedModel, parts: Sequence[_Part]) -> None:
    """Take as many units out of each part as all can spare, if the config can say so."""
    idle = [_idle(model, part) for part in parts]
    n_units = parts[0].n_units
    n_gone = min(*map(len, idle), n_units - 1)
    if n_gone < 1 or any(part.n_units != n_units for part in parts):
        return
    kept = {}
    for part, units in zip(parts, idle, strict=True):
        stays = torch.ones(n_units, dtype=torch.bool)
        stays[units[:n_gone]] = False
        kept[part.reader.name] = stays
    config = _config(model, parts, n_units - n_gone)
    shapes = _shapes_after(model, parts, kept)
    if config is None or _built_shapes(model, config) != shapes:
        return
    for key, value in config.items():
        setattr(model.config, key, value)
    for part in parts:
        _cut(model, part, kept[part.reader.name])


def _idle(model: nn.Module, part: _Part) -> Tensor:
    """Units whose columns are zero in the layer that reads them."""
    sizes = weight_matrix(model, part.reader).abs().amax(0).view(part.n_units, -1).amax(1)
    return (sizes == 0).nonzero().view(-1).cpu()


def _config(model: PreTrainedModel, parts: Sequence[_Part], keep: int) -> dict[str, Any] | None:
    """What changes in the config; None if it does not say the width."""
    config, n_units = model.config, parts[0].n_units
    if parts[0].reader.role == "down":
        names = [n for n in _NEURONS if getattr(config, n, None) == n_units]
        if not names and getattr(config, "n_inner", 0) is None:  # four times the hidden size
            names = ["n_inner"]
        return dict.fromkeys(names, keep) or None
    heads = {n: getattr(config, n) for n in _HEADS if isinstance(getattr(config, n, None), int)}
    if not heads or getattr(config, "head_dim", None) is None:
        return None
    return {name: value // n_units * keep for name, value in heads.items()}


def _shapes_after(
    model: PreTrainedModel, parts: Sequence[_Part], kept: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters once the units are gone."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for part in parts:
        for name, parameter, rows in _cuts(model, part, kept[part.reader.name]):
            shape = list(parameter.shape)
            shape[rows.dim] = len(rows.index)
            shapes[name] = tuple(shape)
    return shapes


def _built_shapes(
    model: PreTrainedModel, changes: Mapping[str, Any]
) -> dict[str, tuple[int, ...]] | None:
    """Shapes that the model class builds from the changed config; None if it cannot."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    try:
        with torch.device("meta"):
            built = type(model)(config)
    except (ValueError, RuntimeError, TypeError):  # "heads must divide the hidden size"
        return None
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}


@dataclass(frozen=True, slots=True)
class _Rows:
    """What stays of one dimension of a tensor."""

    dim: int
    index: Tensor


def _cuts(
    model: nn.Module, part: _Part, stays: Tensor
) -> Iterator[tuple[str, nn.Parameter, _Rows]]:
    """Name and tensor of each parameter of a part that gets smaller, and what stays of it."""
    for layer in (part.reader, *part.writers):
        module = model.get_submodule(layer.name)
        size = layer.in_features if layer is part.reader else layer.out_features
        index = stays.repeat_interleave(size // len(stays)).nonzero().view(-1)
        reads = layer is part.reader
        yield (
            f"{layer.name}.weight",
            cast(nn.Parameter, module.weight),
            _Rows(int(reads != (layer.kind == "conv1d")), index),
        )
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter) and not reads:
            yield f"{layer.name}.bias", bias, _Rows(0, index)


def _cut(model: nn.Module, part: _Part, stays: Tensor) -> None:
    for name, parameter, rows in list(_cuts(model, part, stays)):
        holder, _, leaf = name.rpartition(".")
        smaller = parameter.detach().index_select(rows.dim, rows.index.to(parameter.device))
        setattr(model.get_submodule(holder), leaf, nn.Parameter(smaller, requires_grad=False))
