"""Layer statistics in memory instead of in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autocompress.core import LayerSpec
from autocompress.core.errors import ModelError, nearest
from autocompress.methods import LayerStatistics


@dataclass(frozen=True)
class ResidentStatistics:
    """Statistics by layer name."""

    by_layer: Mapping[str, LayerStatistics]

    def __call__(self, layer: LayerSpec) -> LayerStatistics:
        """The layer's statistics; `ModelError` if they were not collected."""
        if layer.name not in self.by_layer:
            raise ModelError(
                f"Layer {layer.name!r} needs calibration statistics, but none were collected for "
                f"it. {nearest(layer.name, self.by_layer)}"
            )
        return self.by_layer[layer.name]
