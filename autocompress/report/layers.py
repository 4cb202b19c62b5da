"""Bits per weight of single layers, for the heat map."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from autocompress.core import BASE_SCHEME, Footprint, LayerSpec, Scheme
from autocompress.fronts import Member

LayerBits = dict[str, dict[str, float]]
"""Layer in execution order -> text of a scheme -> stored bits per weight."""

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def layer_bits(
    layers: Iterable[LayerSpec],
    entries: Iterable[Member],
    footprint: Callable[[LayerSpec, Scheme], Footprint],
) -> LayerBits:
    """Stored bits per weight of every layer under every scheme that an entry gives it.

    Args:
        layers: the searched layers in execution order.
        entries: members and baselines.
        footprint: `autocompress.methods.footprint`; passed in, so that a report needs no torch.
    """
    used = list(entries)
    table: LayerBits = {}
    for layer in layers:
        texts = dict.fromkeys(e.allocation.get(layer.name, str(BASE_SCHEME)) for e in used)
        table[layer.name] = {str(BASE_SCHEME): layer.base_bytes * 8 / layer.n_weights} | {
            text: footprint(layer, Scheme.parse(text)).storage_bytes * 8 / layer.n_weights
            for text in texts
            if text != str(BASE_SCHEME)
        }
    return table


def block_of(name: str) -> str:
    """Path of the block that a layer is in: up to the first number, e.g. ``model.layers.3``."""
    match = _BLOCK.search(name)
    return name[: match.end(1)] if match else ""


def short_names(names: Sequence[str]) -> list[str]:
    """A short label for each layer that is unique among its block's layers.

    ``encoder.layer.0.attention.self.query`` becomes ``0 query``; where two layers of a block end
    alike, as many parts are kept as tell them apart.
    """
    return [_short_name(name, names) for name in names]


def _short_name(name: str, names: Sequence[str]) -> str:
    block = block_of(name)
    parts = name[len(block) :].strip(".").split(".")
    siblings = [other for other in names if other != name and block_of(other) == block]
    for length in range(1, len(parts) + 1):
        label = ".".join(parts[-length:])
        if not any(other.endswith(f".{label}") or other == label for other in siblings):
            break
    return f"{block.rpartition('.')[2]} {label}".strip()
