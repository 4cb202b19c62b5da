"""Who reads and who writes the residual stream of a transformer: what a rotation must touch.

Nothing here knows a model by name. One short forward shows which linear layers read a norm's
output (their inputs lie in the same memory), and a norm is told from its response to two vectors.
The stream can be rotated where every norm reads it and is read by linear layers alone (QuaRot,
Ashkboos et al. 2024, arXiv 2404.00456, section 3): a norm between a layer's output and the stream
(a post-norm) has a gain per channel that no other weight can take over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from autocompress.core import LayerSpec
from autocompress.core.errors import ModelError
from autocompress.models.layout import ModelLayout, describe, kind_of

NEXT_STEP = (
    "Next step: leave --rotate away; the transform `hadamard` of a search space rotates the inputs "
    "of single layers of any model."
)
_N_PROBE_TOKENS = 16
_STARTS = ("query", "qkv", "gate_up", "up")
_WRITERS = ("output", "down")


@dataclass(frozen=True, slots=True)
class StreamNorm:
    """A norm that reads the residual stream.

    Attributes:
        name: of the module.
        readers: layers that read its output.
        offset: what the module adds to its weight to get its gain: 0, or 1 (Gemma).
        centred: it subtracts the mean (LayerNorm).
    """

    name: str
    readers: tuple[str, ...]
    offset: float
    centred: bool


@dataclass(frozen=True, slots=True)
class HeadPair:
    """The value and the output layer of one attention, and the width of a head."""

    value: str
    output: str
    width: int


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """What reads and writes the residual stream.

    Attributes:
        width: of the stream.
        embeddings: modules whose rows are added to it.
        norms: all that read it.
        writers: layers whose outputs are added to it.
        heads: layers between which nothing but attention lies, head by head.
    """

    width: int
    embeddings: tuple[str, ...]
    norms: tuple[StreamNorm, ...]
    writers: tuple[str, ...]
    heads: tuple[HeadPair, ...]

    @property
    def centred(self) -> bool:
        """True if a norm subtracts the mean, so that a rotation must leave the mean alone."""
        return any(norm.centred for norm in self.norms)


def find_residual_stream(module: nn.Module) -> ResidualStream:
    """Find the readers and writers of the stream; runs one forward of a few tokens.

    Raises:
        ModelError: the stream cannot be rotated; says which rule the model breaks.
    """
    width = _token_embedding(module).embedding_dim
    layout = describe(module)
    norms = tuple(_stream_norms(module, layout, _traced(module, layout, width)))
    read = {reader for norm in norms for reader in norm.readers}
    _check_starts(layout, read, width)
    writers = [layer for layer in layout.layers if layer.role in _WRITERS]
    return ResidualStream(
        width=width,
        embeddings=tuple(
            name
            for name, child in module.named_modules()
            if isinstance(child, nn.Embedding) and child.embedding_dim == width
        ),
        norms=norms,
        writers=tuple(w.name for w in writers if w.out_features == width and w.name not in read),
        heads=tuple(_head_pairs(module, layout)),
    )


def probe_inputs(module: nn.Module) -> dict[str, Tensor]:
    """A few tokens spread over the vocabulary, (1, n)."""
    embedding = _token_embedding(module)
    ids = torch.arange(_N_PROBE_TOKENS) * (embedding.num_embeddings - 1) // (_N_PROBE_TOKENS - 1)
    ids = ids[None].to(embedding.weight.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def refusal(rule: str, got: str) -> ModelError:
    """The error for a model whose stream cannot be rotated."""
    return ModelError(f"A rotation of the whole model needs {rule}, but {got}. {NEXT_STEP}")


def _token_embedding(module: nn.Module) -> nn.Embedding:
    config: Any = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise refusal("one residual stream", f"{type(module).__name__} has an encoder's too")
    accessor = getattr(module, "get_input_embeddings", None)
    embedding = accessor() if accessor is not None else None
    if not isinstance(embedding, nn.Embedding):
        raise refusal(
            "a residual stream that starts with token embeddings",
            f"{type(module).__name__} has none",
        )
    return embedding


@dataclass(frozen=True, slots=True)
class _Trace:
    """Whose output each module read, and which modules read each output, by name."""

    source: dict[str, str]
    readers: dict[str, list[str]]
    norms: tuple[str, ...]


def _traced(module: nn.Module, layout: ModelLayout, width: int) -> _Trace:
    """One forward in which modules are told by the memory that they read and write."""
    watched = {n: m for n, m in module.named_modules() if _is_watched(m) or n in layout.blocks}
    writes: dict[int, str] = {}
    kept: list[Tensor] = []  # no memory is used twice while it is looked up
    source: dict[str, str] = {}
    readers: dict[str, list[str]] = defaultdict(list)

    def before(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        read = next((t for t in (*arguments, *named.values()) if isinstance(t, Tensor)), None)
        found = None if read is None else writes.get(_memory(read))
        if found is not None:
            source[name] = found
            readers[found].append(name)

    def after(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and name not in layout.blocks:
            writes[_memory(output)] = name
            kept.append(output)

    hooks = [
        hook
        for name, child in watched.items()
        for hook in (
            child.register_forward_pre_hook(
                lambda _, a, k, name=name: before(name, a, k), with_kwargs=True
            ),
            child.register_forward_hook(lambda _, __, output, name=name: after(name, output)),
        )
    ]
    try:
        with torch.no_grad():
            module(**probe_inputs(module))
    finally:
        for hook in hooks:
            hook.remove()
    norms = tuple(name for name, child in watched.items() if _is_norm(child, width))
    return _Trace(source, dict(readers), norms)


def _is_watched(child: nn.Module) -> bool:
    """Norms, linear layers and whatever else multiplies by a matrix of its own."""
    shapes = [p.ndim for p in child.parameters(recurse=False)]
    is_scale = shapes[:1] == [1] and hasattr(child, "weight")
    return not isinstance(child, nn.Embedding) and (is_scale or max(shapes, default=0) >= 2)


def _is_norm(child: nn.Module, width: int) -> bool:
    weight = getattr(child, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (width,)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _stream_norms(module: nn.Module, layout: ModelLayout, trace: _Trace) -> Iterator[StreamNorm]:
    roles = {name: layer.role for layer in layout.layers for name in (layer.name, *layer.aliases)}
    for name in trace.norms:
        source = trace.source.get(name)
        if source is not None and roles.get(source) not in (None, *_WRITERS):
            continue  # within attention, e.g. of queries: it never meets the stream
        if source in roles:
            raise refusal(
                "norms that read the residual stream",
                f"{name} is a post-norm: it scales what {source} adds to the stream by a gain per "
                "channel, which does not commute with a rotation",
            )
        readers = trace.readers.get(name, [])
        _check_readers(module, layout, name, readers)
        offset, centred = _nature(module.get_submodule(name), name)
        yield StreamNorm(name, tuple(dict.fromkeys(readers)), offset, centred)


def _check_readers(module: nn.Module, layout: ModelLayout, norm: str, readers: list[str]) -> None:
    if not readers:
        raise refusal(
            "a linear layer after every norm",
            f"none reads {norm} unchanged: its output is the model's, or goes elsewhere first",
        )
    for reader in readers:
        if reader in layout.blocks:
            raise refusal(
                "norms that feed linear layers alone",
                f"{norm} is a post-norm: {reader} takes its output as the residual stream, and a "
                "gain per channel does not commute with a rotation",
            )
        if kind_of(module.get_submodule(reader)) not in ("linear", "conv1d"):
            raise refusal(
                "norms that feed linear layers alone",
                f"{norm} feeds {reader}, a {type(module.get_submodule(reader)).__name__}",
            )


def _check_starts(layout: ModelLayout, read: set[str], width: int) -> None:
    """Every layer that starts attention or feed-forward must be reached through a norm.

    One of another width (the second half of a low-rank projection) reads something within.
    """
    starts = (x for x in layout.layers if x.role in _STARTS and x.in_features == width)
    for layer in starts:
        if layer.name not in read:
            raise refusal(
                "every layer that reads the residual stream to read a norm's output",
                f"{layer.name} ({layer.role}) reads something else",
            )


def _nature(norm: nn.Module, name: str) -> tuple[float, bool]:
    """(what is added to the weight to give the gain, whether the mean is subtracted)."""
    weight = cast(Tensor, norm.weight).detach()
    ramp = torch.linspace(0.5, 1.5, len(weight), dtype=torch.float64).to(weight)
    with torch.no_grad():
        answer = norm(ramp[None])[0].double()
    bias = getattr(norm, "bias", None)
    plain = answer - (0 if bias is None else bias.detach().double())
    for centred in (False, True):
        vector = ramp.double() - (ramp.double().mean() if centred else 0)
        unit = vector / vector.square().mean().sqrt()
        for offset in (0.0, 1.0):
            expected = (weight.double() + offset) * unit
            if torch.allclose(plain, expected, rtol=2e-2, atol=1e-3):
                return offset, centred
    raise refusal(
        "RMSNorm, LayerNorm or their like",
        f"{name} ({type(norm).__name__}) scales a vector by something else than its weight",
    )


def _head_pairs(module: nn.Module, layout: ModelLayout) -> Iterator[HeadPair]:
    """Attention whose heads can be rotated: nothing gates what it reads from the values."""
    by_parent: dict[str, dict[str, LayerSpec]] = defaultdict(dict)
    for layer in layout.layers:
        by_parent[layer.name.rpartition(".")[0]][layer.role] = layer
    for parent, layers in by_parent.items():
        if not {"query", "value", "output"} <= layers.keys():
            continue
        query, value, output = (layers[role] for role in ("query", "value", "output"))
        width = getattr(module.get_submodule(parent), "head_dim", None)
        if not isinstance(width, int) or query.out_features != output.in_features:
            continue
        if value.out_features % width == 0 and output.in_features % value.out_features == 0:
            yield HeadPair(value.name, output.name, width)
