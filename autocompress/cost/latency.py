"""Seconds of a model's layers and of its rest, measured once on one machine. Imports no torch.

A pass of an allocation takes the sum of its layers' seconds and those of the rest: everything that
is no compressible layer (attention, norms, activations, calls). `autocompress device --model`
measures both inside forwards of whole models, so that caches hold what they hold there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from autocompress.core.digest import digest
from autocompress.core.errors import UsageError
from autocompress.core.layer import LayerSpec

_SEPARATOR = ": "


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds of one layer in one pass.

    Attributes:
        seconds: measured; of an expert, averaged over experts that no token was sent to as well.
        roofline: what the roofline of the same device says.
    """

    seconds: float
    roofline: float

    def __post_init__(self) -> None:
        if not (self.seconds >= 0 and self.roofline > 0):
            raise UsageError(
                f"A layer takes time, but got {self.seconds} s measured and {self.roofline} s by "
                "the roofline. Next step: measure the device again."
            )


@dataclass(frozen=True)
class PassTimes:
    """What a pass over some tokens takes, by part.

    Attributes:
        n_tokens: of the pass.
        rest: seconds of all that is no layer.
        layers: by key: kind and shape, colon, coding.
    """

    n_tokens: int
    rest: float
    layers: Mapping[str, LayerTime] = field(hash=False)

    def __post_init__(self) -> None:
        if self.n_tokens < 1 or not self.rest >= 0 or not self.layers:
            raise UsageError(
                "Times of a pass are of at least one token and one layer, but got "
                f"{self.n_tokens} tokens, {len(self.layers)} layers and {self.rest} s for the "
                "rest. Next step: measure the device again."
            )

    def seconds(self, key: str, roofline: float) -> float:
        """Seconds of a layer: measured, or else its roofline scaled as that of like layers is.

        Args:
            key: of the layer under its scheme.
            roofline: seconds of the layer in this pass.
        """
        found = self.layers.get(key)
        return roofline * self.ratio(key) if found is None else found.seconds

    def ratio(self, key: str) -> float:
        """Median of measured over roofline: of the layers of this kind and shape, or of all."""
        shape = key.partition(_SEPARATOR)[0]
        return self._ratios.get(shape, self._ratios[""])

    @cached_property
    def _ratios(self) -> dict[str, float]:
        found: dict[str, list[float]] = {"": []}
        for key, time in self.layers.items():
            for name in ("", key.partition(_SEPARATOR)[0]):
                found.setdefault(name, []).append(time.seconds / time.roofline)
        return {name: median(ratios) for name, ratios in found.items()}


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Measured passes of one model.

    Attributes:
        model: as it was named.
        layers: digest of the names and shapes of its layers; see `layers_digest`.
        dtype: what it computed in.
        passes: by rising number of tokens.
    """

    model: str
    layers: str
    dtype: str
    passes: tuple[PassTimes, ...]

    def __post_init__(self) -> None:
        counts = [times.n_tokens for times in self.passes]
        if not counts or counts != sorted(set(counts)):
            raise UsageError(
                f"A latency table has passes of rising numbers of tokens, but got {counts}. "
                "Next step: measure the device again."
            )

    def at(self, n_tokens: int) -> PassTimes | None:
        """Times of a pass over `n_tokens`, in between linear; None outside of what was measured."""
        place = bisect_left(self.counts, n_tokens)
        if place == len(self.passes):
            return None
        above = self.passes[place]
        if above.n_tokens == n_tokens:
            return above
        return None if place == 0 else _between(self.passes[place - 1], above, n_tokens)

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of tokens that were measured."""
        return tuple(times.n_tokens for times in self.passes)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return {
            "model": self.model,
            "layers": self.layers,
            "dtype": self.dtype,
            "passes": [
                {
                    "tokens": times.n_tokens,
                    "rest_seconds": times.rest,
                    "layers": {k: [t.seconds, t.roofline] for k, t in times.layers.items()},
                }
                for times in self.passes
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `to_json`.

        Raises:
            UsageError: a number makes no sense.
            KeyError, TypeError, ValueError, AttributeError: it is no such object.
        """
        passes = tuple(
            PassTimes(
                int(entry["tokens"]),
                float(entry["rest_seconds"]),
                {
                    str(key): LayerTime(float(seconds), float(roofline))
                    for key, (seconds, roofline) in entry["layers"].items()
                },
            )
            for entry in data["passes"]
        )
        return cls(str(data["model"]), str(data["layers"]), str(data["dtype"]), passes)


def layer_key(layer: LayerSpec, coding: str) -> str:
    """Key of a layer in a table: equal for layers that do the same.

    Args:
        layer: the layer.
        coding: how its weight is stored and multiplied by.
    """
    kind = f"{layer.kind} with head" if _looks_up_and_multiplies(layer) else layer.kind
    if layer.expert is not None:
        kind += f" of {layer.expert.n_experts} experts, {layer.expert.per_token} per token"
    return f"{kind} {layer.out_features}x{layer.in_features}{_SEPARATOR}{coding}"


def layers_digest(layers: Iterable[LayerSpec]) -> str:
    """Equal for models whose blocks have the same layers: only then is the rest the same."""
    inside = (layer for layer in layers if layer.block is not None)
    return digest(sorted([x.name, x.out_features, x.in_features] for x in inside))


def _looks_up_and_multiplies(layer: LayerSpec) -> bool:
    return layer.kind == "embedding" and layer.macs_per_token > 0


def _between(below: PassTimes, above: PassTimes, n_tokens: int) -> PassTimes:
    share = (n_tokens - below.n_tokens) / (above.n_tokens - below.n_tokens)

    def mixed(low: float, high: float) -> float:
        return low + share * (high - low)

    layers = {
        key: LayerTime(
            mixed(time.seconds, above.layers[key].seconds),
            mixed(time.roofline, above.layers[key].roofline),
        )
        for key, time in below.layers.items()
        if key in above.layers
    }
    return PassTimes(n_tokens, mixed(below.rest, above.rest), layers)
