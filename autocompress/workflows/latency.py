"""Measure what each layer of a model takes under each option of a space, and what the rest takes.

Every pass runs a whole model in which each choice has one of its options, so that a few models see
all of them. A layer counts with its least time of a few rounds, averaged over layers of equal shape
and coding; the rest is a pass of the base model less its layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from statistics import fmean

from autocompress.core import BASE_ALLOCATION, Allocation, LayerSpec, Scheme
from autocompress.core.errors import UsageError
from autocompress.cost import CostModel, DeviceProfile, LatencyTable, LayerTime, PassTimes
from autocompress.cost.latency import layers_digest
from autocompress.cost.model import time_key
from autocompress.evaluate import TASKS
from autocompress.evaluate.images import ImageGeometry
from autocompress.export.pass_timing import Stored, TimedModel, packed_model
from autocompress.export.targets import space_for
from autocompress.models import BaseModel, load_base_model, load_config
from autocompress.spaces import SearchSpace
from autocompress.workflows.session import QUIET, Progress
from autocompress.workflows.settings import resolve_model
from autocompress.workflows.tasks import task_name_of

_DECODER_TOKENS, _ENCODER_TOKENS = (1, 256), (16, 64, 256)
_SWEEPS = 2  # a machine is not equally fast all the time
_ROUNDS, _LEAST_ROUNDS, _ENOUGH_SECONDS = 40, 5, 5.0
_AGREE, _WITHIN = 3, 1.02  # so many rounds within 2 % of the least: others only confirm it
_WEIGHTS_PER_ENTRY = 1 << 28  # of a large model some layers stand for all
_LEAST_LAYERS = 2


def measure_latency(
    profile: DeviceProfile,
    model: str,
    space: str,
    *,
    task: str = "auto",
    tokens: Sequence[int] = (),
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = QUIET,
) -> DeviceProfile:
    """The profile with a latency table of a model and a search space.

    Args:
        profile: what `measure_device` found on this machine.
        model: directory, hub id or ``package:NAME/FOLDER``.
        space: name of a space, or a YAML file.
        task: decides about the model's head.
        tokens: of the passes, one sequence at a time; one token is decoded after some others where
            the model has a cache. Empty for 1 and 256 of decoders, else 16, 64 and 256; what an
            image has.
        dtype: what the model computes in; ``auto`` for the checkpoint's.
        device: torch device.
        trust_remote_code: let code that ships with the model run.
        progress: told how many entries there are, and how far it is.

    Raises:
        UsageError: a number of tokens is not positive.
        ModelError: the model cannot be loaded or packed, or does not take so many tokens.
        SpaceError: the space does not fit the model.
        UnknownNameError: no such task or space.
    """
    source = resolve_model(model)
    config = load_config(source, trust_remote_code=trust_remote_code)
    name = task_name_of(source, config, task)
    base = load_base_model(
        source,
        TASKS[name].auto_class,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    counts = _token_counts(tokens, base, config)
    table = _Measurement(base, space_for("any", space, base), profile, counts, model).table(
        progress
    )
    return replace(profile, latency=table)


@dataclass(frozen=True, eq=False)
class _Measurement:
    base: BaseModel
    space: SearchSpace
    profile: DeviceProfile
    counts: tuple[int, ...]
    model: str
    stored: Stored = field(default_factory=Stored)

    def table(self, progress: Progress) -> LatencyTable:
        """Run all passes of all sweeps."""
        variants = list(_variants(self.space, self.base.layout.layers))
        fastest = {n: _Fastest(n) for n in self.counts}
        n_keys = len(
            {time_key(layer, scheme) for v in variants for layer, scheme in self._parts(v)}
        )
        n_entries = n_keys * len(self.counts)
        progress.step(
            f"Measuring {n_entries:,} entries ({n_keys:,} kinds of layers at "
            f"{', '.join(map(str, self.counts))} tokens) in {len(variants):,} models"
        )
        for sweep in range(_SWEEPS):
            for number, variant in enumerate(variants):
                self._measure(variant, fastest)
                progress.advance(sweep * len(variants) + number + 1, _SWEEPS * len(variants))
        dtype = str(next(self.base.module.parameters()).dtype).removeprefix("torch.")
        passes = tuple(self._times(fastest[n]) for n in self.counts)
        return LatencyTable(self.model, layers_digest(self.base.layout.layers), dtype, passes)

    def _measure(self, variant: Allocation, fastest: Mapping[int, _Fastest]) -> None:
        model = packed_model(self.base, variant, self.stored)
        layers = {layer.name: layer for layer in self.base.layout.layers}
        for n, found in fastest.items():
            timed = TimedModel.of(model, self.base.auto_class, n)
            timed.warm_up()
            end, wholes = time.perf_counter() + _ENOUGH_SECONDS, list[float]()
            while _goes_on(wholes) and (len(wholes) < _LEAST_ROUNDS or time.perf_counter() < end):
                whole, parts = timed.parts(layers)
                found.add(variant, whole, parts)
                wholes.append(whole)

    def _times(self, fastest: _Fastest) -> PassTimes:
        profile = replace(self.profile, latency=None)
        layout = self.base.layout
        cost = CostModel(layout.layers, layout.other_bytes, 0, profile, fastest.n_tokens)
        seconds: dict[str, list[float]] = {}
        rooflines: dict[str, float] = {}
        for variant, found in fastest.layers.items():
            for layer, scheme in self._parts(variant):
                key = time_key(layer, scheme)
                seconds.setdefault(key, []).append(found[layer.name])
                part = cost.part(layer, scheme)
                rooflines[key] = part.seconds(profile) * fastest.n_tokens
        layers = {key: LayerTime(fmean(seconds[key]), rooflines[key]) for key in sorted(seconds)}
        rest = fastest.whole[BASE_ALLOCATION] - sum(fastest.layers[BASE_ALLOCATION].values())
        return PassTimes(fastest.n_tokens, rest, layers)

    def _parts(self, variant: Allocation) -> Iterator[tuple[LayerSpec, Scheme]]:
        """Layers whose times count: those that stay uncompressed do in the base model alone."""
        for layer in self.base.layout.layers:
            scheme = variant.scheme(layer.name)
            if variant == BASE_ALLOCATION or not scheme.is_base:
                yield layer, scheme


@dataclass(eq=False)
class _Fastest:
    """Least seconds so far, of whole passes and of the layers in them, by variant."""

    n_tokens: int
    whole: dict[Allocation, float] = field(default_factory=dict)
    layers: dict[Allocation, dict[str, float]] = field(default_factory=dict)

    def add(self, variant: Allocation, whole: float, layers: Mapping[str, float]) -> None:
        """Take note of one pass."""
        self.whole[variant] = min(whole, self.whole.get(variant, inf))
        known = self.layers.get(variant, {})
        self.layers[variant] = {n: min(s, known.get(n, inf)) for n, s in layers.items()}


def _variants(space: SearchSpace, layers: Sequence[LayerSpec]) -> Iterator[Allocation]:
    """The base, then allocations that together give every layer's kind all of its schemes."""
    yield BASE_ALLOCATION
    by_name = {layer.name: layer for layer in layers}
    seen: set[str] = set()
    for level in range(max(len(choice.options) for choice in space.choices)):
        taken: dict[str, list[LayerSpec]] = {}
        schemes: dict[str, Scheme] = {}
        for choice in space.choices:
            option = choice.options[level % len(choice.options)]
            pairs = dict(zip(choice.layers, option.schemes, strict=True))
            if all(_has_room(taken, by_name[n], s) for n, s in pairs.items() if not s.is_base):
                schemes |= pairs
                for name, scheme in pairs.items():
                    taken.setdefault(time_key(by_name[name], scheme), []).append(by_name[name])
        keys = {time_key(by_name[n], s) for n, s in schemes.items() if not s.is_base}
        if keys - seen:
            seen |= keys
            yield Allocation.of(schemes)


def _has_room(taken: Mapping[str, Sequence[LayerSpec]], layer: LayerSpec, scheme: Scheme) -> bool:
    others = taken.get(time_key(layer, scheme), ())
    weights = sum(other.n_weights for other in others) + layer.n_weights
    return len(others) < _LEAST_LAYERS or weights <= _WEIGHTS_PER_ENTRY


def _goes_on(wholes: Sequence[float]) -> bool:
    """Whether another round may find less: not where the shortest ones agree."""
    if len(wholes) >= _ROUNDS:
        return False
    if len(wholes) < _LEAST_ROUNDS:
        return True
    shortest = sorted(wholes)
    return shortest[_AGREE - 1] > _WITHIN * shortest[0]


def _token_counts(tokens: Sequence[int], base: BaseModel, config: object) -> tuple[int, ...]:
    if any(n < 1 for n in tokens):
        raise UsageError(f"A pass has at least 1 token, but got --tokens {min(tokens)}.")
    if base.auto_class == "AutoModelForImageClassification":
        return (ImageGeometry.of(base.processor, config).n_tokens,)
    decodes = base.auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    return tuple(sorted(set(tokens))) or (_DECODER_TOKENS if decodes else _ENCODER_TOKENS)
