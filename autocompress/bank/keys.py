"""By what an entry of the bank is found: the content that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from autocompress.bank.code import code_digest
from autocompress.bank.entries import FORMAT_VERSION, checksum
from autocompress.core import LayerSpec, Scheme, digest
from autocompress.methods import LayerStatistics, Needs, needs, reader, sharing_layers


class Layers(Protocol):
    """Layers by name, as `models.ModelLayout` gives them."""

    def layer(self, name: str) -> LayerSpec:
        """The layer of that name; `ModelError` with the nearest names if there is none."""
        ...


class Keys:
    """Keys of entries: digests of weights, statistics (if a scheme uses them), scheme and code.

    Where layers share, the weights and statistics of all of them, and the place of the layer; where
    outputs of a layer go, the weight and statistics of the one that reads them.

    Args:
        layout: the model's layers.
        weights: base weights by layer name.
        statistics: of a layer; asked only for schemes that need them.
    """

    def __init__(
        self,
        layout: Layers,
        weights: Mapping[str, Tensor],
        statistics: Callable[[LayerSpec], LayerStatistics],
    ) -> None:
        self._layout = layout
        self._weights = weights
        self._statistics = statistics
        self._weight_digests: dict[str, str] = {}
        self._statistics_digests: dict[str, str] = {}

    def key(self, layer: LayerSpec, scheme: Scheme) -> str:
        """Of a layer under a canonical scheme."""
        sharing, read = self.sharing(layer, scheme), self.reader(layer, scheme)
        made_of = sharing if read is None else [*sharing, read]
        weights = map(self._weight_digest, made_of)
        parts = [FORMAT_VERSION, code_digest(scheme), *weights, str(scheme)]
        if needs(scheme) is not Needs.NONE:
            parts += map(self._statistics_digest, made_of)
        if len(sharing) > 1:
            parts.append(str(sharing.index(layer)))
        return digest(parts)

    def lock_name(self, layer: LayerSpec, scheme: Scheme) -> str:
        """Equal where options share decompositions: equal weights and statistics."""
        sharing, uses = self.sharing(layer, scheme), needs(scheme) is not Needs.NONE
        return "".join(
            self._weight_digest(one) + (self._statistics_digest(one) if uses else "")
            for one in sharing
        )

    def sharing(self, layer: LayerSpec, scheme: Scheme) -> list[LayerSpec]:
        """The layers that are compressed together with one; it alone if it does not share."""
        names = sharing_layers(layer.name, scheme)
        return [layer] if names == (layer.name,) else list(map(self._layout.layer, names))

    def reader(self, layer: LayerSpec, scheme: Scheme) -> LayerSpec | None:
        """The layer that chooses which outputs of `layer` go; None if none go."""
        name = reader(layer.name, scheme)
        return None if name is None else self._layout.layer(name)

    def _statistics_digest(self, layer: LayerSpec) -> str:
        if layer.name not in self._statistics_digests:
            self._statistics_digests[layer.name] = self._statistics(layer).digest
        return self._statistics_digests[layer.name]

    def _weight_digest(self, layer: LayerSpec) -> str:
        if layer.name not in self._weight_digests:
            weight = self._weights[layer.name]
            self._weight_digests[layer.name] = checksum({"weight": weight})
        return self._weight_digests[layer.name]
