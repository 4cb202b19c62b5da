"""What a compressed model costs to store and to run: from shapes, and measured times of layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from autocompress.core.allocation import Allocation
from autocompress.core.errors import UsageError, nearest
from autocompress.core.footprint import Footprint
from autocompress.core.layer import LayerSpec
from autocompress.core.metrics import Resource, Resources
from autocompress.core.scheme import Scheme
from autocompress.cost.latency import PassTimes, layer_key, layers_digest
from autocompress.cost.profiles import DeviceProfile
from autocompress.kernels import signature
from autocompress.methods import footprint, require_whole, shares

ANALYTIC, MEASURED = "analytic", "measured"


@dataclass(frozen=True)
class CostModel:
    """Resources of an allocation on a named device.

    Attributes:
        layers: every compressible layer of the model.
        other_bytes: bytes of everything that is no layer's weight.
        other_macs_per_token: multiply-accumulates per token of what cannot be compressed.
        profile: the device.
        tokens_per_pass: tokens that share one reading of the weights: 1 where tokens are generated
            one by one, the sequence length for encoders.
        searched_layers: names of the layers that `bits_per_weight` is about; None: all.
    """

    layers: tuple[LayerSpec, ...]
    other_bytes: int
    other_macs_per_token: int
    profile: DeviceProfile
    tokens_per_pass: int = 1
    searched_layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens_per_pass < 1:
            raise UsageError(
                f"tokens_per_pass must be at least 1, but got {self.tokens_per_pass}. "
                "Give 1 for generation, the sequence length for an encoder."
            )
        self._check_known(self.searched_layers or ())

    def resources(self, allocation: Allocation) -> Resources:
        """The cost of an allocation; of the base model for the empty one.

        * ``storage_bytes``: what the exported file's tensors hold, to the byte.
        * ``macs_per_token``: on dense kernels; zeros are not skipped.
        * ``bytes_moved_per_token``: every stored byte is read once per pass, which
          `tokens_per_pass` tokens share, and once by each layer that borrows it; a look-up reads
          one row per token, and an expert that none of them is sent to is not read (where all
          are as likely).
        * ``latency_ms_per_token``: where the profile has times of this model at so many tokens,
          the sum of its layers' and of the rest's, on the kernels that ``load(kernels="auto")``
          chooses; a layer that was not measured counts with its roofline, scaled as that of like
          layers is. Else the roofline (Williams et al. 2009), layer by layer: the longer of
          computing and reading. That is a bound for ideal kernels that read the packed weights,
          not a prediction; activations and attention scores are not counted.
        * ``peak_memory_bytes``: packed weights, and the dense weight of the largest compressed
          layer, which is decoded while it multiplies; a look-up decodes its rows alone.

        Raises:
            UsageError: the allocation names a layer that the model does not have.
            SchemeError: a layer shares with one that does not share with it.
        """
        self._check_known(allocation)
        require_whole(allocation)
        parts = [self.part(layer, allocation.scheme(layer.name)) for layer in self.layers]
        parts.append(self.rest)
        stored = sum(part.stored for part in parts)
        seconds = sum(part.seconds(self.profile) for part in parts)
        return {
            "storage_bytes": Resource(stored, "bytes", ANALYTIC),
            "macs_per_token": Resource(sum(part.macs for part in parts), "macs", ANALYTIC),
            "bytes_moved_per_token": Resource(sum(p.moved for p in parts), "bytes", ANALYTIC),
            "latency_ms_per_token": Resource(1e3 * seconds, "ms", self._origin(parts[:-1])),
            "peak_memory_bytes": Resource(
                stored + max(part.decoded for part in parts), "bytes", ANALYTIC
            ),
        }

    def bits_per_weight(self, allocation: Allocation) -> float:
        """Stored bits of the searched layers over their weights: scales, masks, all included.

        Raises:
            UsageError: the allocation names an unknown layer, or no layer is searched.
        """
        self._check_known(allocation)
        searched = list(self._searched())
        if not searched:
            raise UsageError("Bits per weight need at least one searched layer, but got none.")
        bits = 8 * sum(
            layer_footprint(layer, allocation.scheme(layer.name)).storage_bytes
            for layer in searched
        )
        return bits / sum(layer.n_weights for layer in searched)

    def _searched(self) -> Iterator[LayerSpec]:
        wanted = None if self.searched_layers is None else set(self.searched_layers)
        return (layer for layer in self.layers if wanted is None or layer.name in wanted)

    def part(self, layer: LayerSpec, scheme: Scheme) -> CostPart:
        """What one layer under a scheme adds to `resources`."""
        cost = layer_footprint(layer, scheme)
        looked_up = layer.kind == "embedding" and layer.macs_per_token == 0
        rows = layer.out_features if looked_up else None
        part = CostPart(
            stored=cost.storage_bytes,
            macs=cost.macs_per_token,
            moved=self._moved(cost, rows) * self._reached(layer),
            decoded=0 if looked_up or scheme.is_base else layer.base_bytes,
        )
        if self._times is None:
            return part
        key = time_key(layer, scheme)
        roofline = part.seconds(self.profile) * self.tokens_per_pass
        seconds = self._times.seconds(key, roofline) / self.tokens_per_pass
        return replace(part, timed=seconds, is_measured=key in self._times.layers)

    @cached_property
    def _times(self) -> PassTimes | None:
        """Measured times of this model at so many tokens."""
        table = self.profile.latency
        if table is None or table.layers != layers_digest(self.layers):
            return None
        return table.at(self.tokens_per_pass)

    def _origin(self, layers: Sequence[CostPart]) -> str:
        """Of the latency of these layers and the rest."""
        profile, table = self.profile, self.profile.latency
        if table is None:
            return f"{ANALYTIC} (roofline of {profile.name})"
        if self._times is None:
            counts = ", ".join(map(str, table.counts))
            return (
                f"{ANALYTIC} (roofline of {profile.name}; its times are of {table.model} at "
                f"{counts} tokens, not of this model at {self.tokens_per_pass})"
            )
        origin = f"{MEASURED} on {profile.name} in {table.dtype}"
        if self.tokens_per_pass not in table.counts:
            origin += f", interpolated to {self.tokens_per_pass} tokens"
        n = sum(part.is_measured for part in layers)
        if n < len(layers):
            origin += f", {n} of {len(layers)} layers; the others by their scaled roofline"
        return origin

    def _moved(self, cost: Footprint, rows: int | None) -> float:
        """Bytes read per token; `rows` of a look-up table, None for a matrix that multiplies."""
        whole = cost.read_bytes
        if rows is None:
            return whole / self.tokens_per_pass
        # The second factor of a factorized table multiplies every row that is looked up.
        inner = sum(t.n_bytes for name, t in cost.tensors.items() if name.startswith("b."))
        return (whole - inner) / rows + inner / self.tokens_per_pass

    def _reached(self, layer: LayerSpec) -> float:
        return 1.0 if layer.expert is None else layer.expert.reached(self.tokens_per_pass)

    @cached_property
    def rest(self) -> CostPart:
        """What all that is no layer adds to `resources`."""
        moved = self.other_bytes / self.tokens_per_pass
        timed = None if self._times is None else self._times.rest / self.tokens_per_pass
        return CostPart(self.other_bytes, self.other_macs_per_token, moved, decoded=0, timed=timed)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(layer.name for layer in self.layers)

    def _check_known(self, names: Collection[str]) -> None:
        unknown = next((name for name in names if name not in self._names), None)
        if unknown is not None:
            raise UsageError(
                f"A cost is that of the model's layers, but {unknown!r} is none of them. "
                f"{nearest(unknown, self._names)}"
            )


@dataclass(frozen=True, slots=True)
class CostPart:
    """Cost of one layer, or of all that is no layer.

    Attributes:
        stored: bytes in the file.
        macs: multiply-accumulates per token.
        moved: bytes read per token.
        decoded: bytes of the dense weight, if it is decoded to multiply.
        timed: seconds per token by the profile's measured times; None: it has none.
        is_measured: this very layer and coding was, not only others that scale its roofline.
    """

    stored: int
    macs: int
    moved: float
    decoded: int
    timed: float | None = None
    is_measured: bool = False

    def seconds(self, profile: DeviceProfile) -> float:
        """Time per token: measured, else bound by arithmetic or by memory, whichever is longer."""
        if self.timed is not None:
            return self.timed
        return max(2 * self.macs / profile.flops_per_second, self.moved / profile.bytes_per_second)

    def additive(self, profile: DeviceProfile) -> dict[str, float]:
        """By the name of a resource, what is summed over parts; not so the peak memory."""
        return {
            "storage_bytes": self.stored,
            "macs_per_token": self.macs,
            "bytes_moved_per_token": self.moved,
            "latency_ms_per_token": 1e3 * self.seconds(profile),
        }


@lru_cache(maxsize=1 << 17)
def layer_footprint(layer: LayerSpec, scheme: Scheme) -> Footprint:
    """`methods.footprint`, remembered: a search asks for the same few thousand all the time."""
    return footprint(layer, scheme)


@lru_cache(maxsize=1 << 17)
def time_key(layer: LayerSpec, scheme: Scheme) -> str:
    """Key of a layer under a scheme in a latency table; schemes that run alike have one."""
    if scheme.is_base:
        return layer_key(layer, "base")
    coding = signature((layer.out_features, layer.in_features), scheme)
    return layer_key(layer, f"{coding}, shared" if shares(scheme) else coding)
