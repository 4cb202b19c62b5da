"""Blocks of which nothing is left are taken out of a model that is written dense.

A block whose layers are all dropped puts out what it reads, if no bias or norm of its own adds to
that. Whether it does is seen in a forward, not guessed from names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autocompress.core import Allocation
from autocompress.export.pass_inputs import pass_inputs
from autocompress.export.writing import parameter_bytes
from autocompress.methods import drops
from autocompress.models.layout import ModelLayout

_TOKENS = 8
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists in a config with one item for each block."""
_BY_NUMBER = ("mlp_only_layers", "attention_types", "layers_block_type", "cross_attention_layers")
"""What in a config names blocks in other ways: such models keep all of theirs."""


@contextmanager
def shortened(
    model: PreTrainedModel, layout: ModelLayout, allocation: Allocation, auto_class: str
) -> Iterator[int]:
    """Within the block, `model` and its config are without the blocks that do nothing.

    Args:
        model: computes with the compressed weights; as it was afterwards.
        layout: of the base model.
        allocation: what it was compressed by.
        auto_class: it was loaded with.

    Yields:
        Bytes of all that was taken out.
    """
    place = _stack(model, layout)
    candidates = _dropped_blocks(layout, allocation) if place else ()
    idle = _idle(model, place, candidates, auto_class) if candidates else ()
    if not idle:
        yield 0
        return
    holder, _, name = place.rpartition(".")
    parent, blocks = model.get_submodule(holder), model.get_submodule(place)
    assert isinstance(blocks, nn.ModuleList)  # _stack has checked
    kept = [number for number in range(len(blocks)) if number not in idle]
    before = {key: getattr(model.config, key) for key in _config(model.config, kept)}
    try:
        setattr(parent, name, nn.ModuleList(blocks[number] for number in kept))
        for key, value in _config(model.config, kept).items():
            setattr(model.config, key, value)
        yield sum(parameter_bytes(blocks[number]) for number in idle)
    finally:
        setattr(parent, name, blocks)
        for key, value in before.items():
            setattr(model.config, key, value)


def _stack(model: PreTrainedModel, layout: ModelLayout) -> str:
    """Name of the list that holds all blocks; empty if there is none, or its config hinders it."""
    config = model.config
    places = {
        layer.place.before for layer in layout.layers if layer.block is not None and layer.place
    }
    if len(places) != 1 or config.is_encoder_decoder:
        return ""
    if any(getattr(config, name, None) for name in _BY_NUMBER):
        return ""
    name = places.pop()
    blocks = model.get_submodule(name)
    is_whole = isinstance(blocks, nn.ModuleList) and len(blocks) == getattr(
        config, "num_hidden_layers", None
    )
    return name if is_whole else ""


def _dropped_blocks(layout: ModelLayout, allocation: Allocation) -> tuple[int, ...]:
    """Numbers of the blocks all of whose layers are dropped; never all blocks."""
    layers: dict[int, list[str]] = {}
    for layer in layout.layers:
        if layer.block is not None:
            layers.setdefault(layer.block, []).append(layer.name)
    found = tuple(
        block
        for block, names in layers.items()
        if all(drops(allocation.scheme(name)) for name in names)
    )
    return found if len(found) < len(layers) else found[1:]


def _idle(
    model: PreTrainedModel, place: str, candidates: tuple[int, ...], auto_class: str
) -> frozenset[int]:
    """Those of the candidates that put out what they read, to the last bit."""
    found: set[int] = set()

    def compare(number: int, read: Tensor | None, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if read is not None and hidden.shape == read.shape and torch.equal(hidden, read):
            found.add(number)

    blocks = model.get_submodule(place)
    handles = [
        blocks.get_submodule(str(number)).register_forward_hook(
            lambda _, args, kwargs, output, number=number: compare(
                number, args[0] if args else kwargs.get("hidden_states"), output
            ),
            with_kwargs=True,
        )
        for number in candidates
    ]
    try:
        with torch.no_grad():
            model(**pass_inputs(model, auto_class, _TOKENS)())
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(found)


def _config(config: Any, kept: list[int]) -> Mapping[str, Any]:
    """What a config says of a model of these blocks alone."""
    lists = {name: getattr(config, name, None) for name in _PER_LAYER}
    return {"num_hidden_layers": len(kept)} | {
        name: [value[number] for number in kept] for name, value in lists.items() if value
    }
