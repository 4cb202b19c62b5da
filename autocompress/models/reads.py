"""Which layers a forward calls, and on which tensors: what a layout assumes, held to what happens.

`describe` sees names and shapes, so it takes the query, key and value of a block for readers of one
tensor. Keys of attention over fewer places than queries (PVT, SegFormer) are not, nor are layers
that read a mix of tokens of their own (RWKV). Layers that share statistics must read the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.core import LayerSpec
from autocompress.core.errors import ModelError
from autocompress.models.calibration import Batch
from autocompress.models.layout import ModelLayout, kind_of


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor that a layer was called on; equal for one tensor that was not written between.

    Attributes:
        address: of its first element.
        shape: with any number of leading axes.
        strides: in elements.
        version: how often it was written in place.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    version: int


Reads = Mapping[str, list[Read]]
"""By the name of a layer, what each of its calls read; layers that were not called are absent."""


def reads_of(module: nn.Module, layout: ModelLayout, batch: Batch) -> Reads:
    """Run a forward and say what every layer reads in it.

    Args:
        module: the model, in evaluation mode.
        layout: of the model.
        batch: model inputs, on any device; a sequence is enough.
    """
    device = next(module.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    kept: list[Tensor] = []  # no memory is used twice while it is looked at
    with torch.no_grad(), watched_reads(module, layout, layout.layers, kept) as reads:
        module(**inputs)
    return reads


def called_of(module: nn.Module, layers: Iterable[LayerSpec], batch: Batch) -> set[str]:
    """Run a forward and name those of the layers of which it calls any module.

    Args:
        module: the model, in evaluation mode.
        layers: to look for; an embedding that is also the head has two modules.
        batch: model inputs, on any device.
    """
    device = next(module.parameters()).device
    called: set[str] = set()
    with torch.no_grad(), ExitStack() as hooks:
        for layer in layers:
            for name in (layer.name, *layer.aliases):
                note = partial(_add, called, layer.name)
                handle = module.get_submodule(name).register_forward_pre_hook(note)
                hooks.callback(handle.remove)
        module(**{name: tensor.to(device) for name, tensor in batch.items()})
    return called


def _add(names: set[str], name: str, *_: object) -> None:
    names.add(name)


@contextmanager
def watched_reads(
    module: nn.Module,
    layout: ModelLayout,
    layers: Iterable[LayerSpec],
    kept: list[Tensor] | None = None,
) -> Iterator[Reads]:
    """Within the context, what these layers are called on is added to the result.

    Args:
        module: the model.
        layout: of the model.
        layers: to watch.
        kept: gets every tensor that layers are taken to share, which stays alive with it. Without
            it, one that takes the memory of another that is gone looks like that one.
    """
    readers = _readers(layout)
    reads: dict[str, list[Read]] = {}

    def watch(layer: LayerSpec, holder: nn.Module, hooks: ExitStack) -> None:
        def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            tensor: Tensor = arguments[0]
            if kept is not None and readers[layer.input_name] > 1:
                kept.append(tensor)
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor._version)
            reads.setdefault(layer.name, []).append(Read(*place))

        hooks.callback(holder.register_forward_pre_hook(note).remove)

    with ExitStack() as hooks:
        for layer in layers:
            for holder in _called(module, layer):
                watch(layer, holder, hooks)
        yield reads


def as_read(layout: ModelLayout, reads: Reads) -> ModelLayout:
    """The layout with an input for each tensor that layers read; equal if it was right.

    Layers that read nothing count as readers of one tensor, if they were taken for that before.
    """
    readers = _readers(layout)
    names: dict[tuple[str, tuple[Read, ...]], str] = {}
    taken: set[str] = set()
    layers = []
    for layer in layout.layers:
        given = layer.input_name
        if given is None or readers[given] == 1:
            layers.append(layer)
            continue
        key = given, tuple(reads.get(layer.name, ()))
        if key not in names:
            names[key] = layer.name if given in taken else given
            taken.add(given)
        layers.append(replace(layer, input_name=names[key]))
    return replace(layout, layers=tuple(layers))


def require_shared(layout: ModelLayout, reads: Reads) -> None:
    """Refuse statistics that layers would share though they read different tensors.

    Args:
        layout: of the model.
        reads: of a forward that may have ended early.

    Raises:
        ModelError: names two such layers.
    """
    for layer in layout.layers:
        first = layer.input_name
        if first is None or layer.name not in reads or first not in reads:
            continue
        for ours, theirs in zip(reads[layer.name], reads[first], strict=False):
            if ours != theirs:
                raise ModelError(
                    f"Layers of one input must read one tensor, but {layer.name!r} and {first!r} "
                    f"read different ones, of shapes {ours.shape} and {theirs.shape}. Next step: "
                    "describe the model as it reads, `as_read(layout, reads_of(module, layout, "
                    "batch))`, as `autocompress search` does."
                )


def sharing(layout: ModelLayout) -> list[LayerSpec]:
    """The layers that are taken to share an input with others."""
    readers = _readers(layout)
    return [x for x in layout.layers if x.input_name is not None and readers[x.input_name] > 1]


def _readers(layout: ModelLayout) -> Counter[str | None]:
    """How many layers read each input."""
    return Counter(layer.input_name for layer in layout.layers)


def _called(module: nn.Module, layer: LayerSpec) -> list[nn.Module]:
    """The modules through which a layer multiplies; of one that does not, the embeddings."""
    found = {id(m): m for m in map(module.get_submodule, (layer.name, *layer.aliases))}
    multiplies = layer.input_name is not None
    return [m for m in found.values() if (kind_of(m) != "embedding") == multiplies]
