"""Studies without a model: allocations are answered from a table of measured damages.

A table holds what single options and pairs of options were measured to damage on a real model. The
damage of a whole allocation follows from it in microseconds, so whole studies, samplers, drivers
and seeds can be compared in seconds and on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core import (
    LATENCY,
    STORAGE,
    Allocation,
    Measurement,
    Metrics,
    Quality,
    Resource,
    Resources,
    Scheme,
    TrialRequest,
    TrialResult,
    TrialStatus,
    derived_seed,
)
from autocompress.core.errors import DataError, SpaceError, UsageError, nearest
from autocompress.search.option_table import OptionTable, PerChoice
from autocompress.search.racing import Racing
from autocompress.spaces import SearchSpace

FORMAT_VERSION = 1
SINGLES = "singles"
"""Name under which the measured single-option damages are offered as scores."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Response:
    """How the sum of damages becomes the damage of the whole: ``c (1 - exp(-g x^p / c))``.

    Damages have a ceiling c that no sum passes; g and p say how errors build up along the depth.
    """

    gain: float = 1.0
    power: float = 1.0
    ceiling: float = 1.0

    def __call__(self, total: float) -> float:
        """The damage of a sum; 0 for a sum that is not positive."""
        if total <= 0.0:
            return 0.0
        return self.ceiling * -float(np.expm1(-self.gain * total**self.power / self.ceiling))


@dataclass(frozen=True, slots=True)
class SequenceNoise:
    """What measuring on few sequences does to a damage.

    Sequence s of an allocation has the damage ``D exp(common z_s + own z_as)`` with standard
    normal z, scaled to the mean D. What is common to all allocations cancels in paired
    differences, their own part does not.

    Attributes:
        n_sequences: of the search split.
        common: standard deviation of the logarithm, shared by all allocations.
        own: standard deviation of the logarithm of each allocation by itself.
        seed: of the drawn split.
    """

    n_sequences: int = 32
    common: float = 0.5
    own: float = 0.2
    seed: int = 0

    def damages(self, damage: float, allocation: Allocation) -> Floats:
        """Damage of each sequence, shape (n_sequences,)."""
        shared = np.random.default_rng(derived_seed("sequences", self.seed))
        seed = derived_seed("noise", self.seed, allocation.digest)
        private = np.random.default_rng(seed)
        logs = self.common * shared.standard_normal(self.n_sequences)
        logs += self.own * private.standard_normal(self.n_sequences)
        return np.asarray(damage * np.exp(logs - (self.common**2 + self.own**2) / 2))


@dataclass(frozen=True, eq=False)
class ReplayTable:
    """Measured damages of one model over one search space.

    The F options of all choices lie in one row, choice after choice in the order of the space.

    Attributes:
        space: what may be chosen.
        singles: (F,) damage of each option alone, all other layers uncompressed.
        pairs: (F, F) symmetric; what two options of different choices damage together beyond the
            sum of both; 0 where nothing is known.
        scores: by name, (F,) what other criteria predict for each option alone.
        fixed_bytes: stored bytes of all that is not searched.
        n_tokens: search tokens of a trial.
        damage_name: metric that the damage is.
        response: from the sum of singles and pairs to the damage.
        facts: where the numbers come from and how well they predict; JSON values.
        costs: by the name of a resource beside bytes, (F,) what each option adds to it; no part of
            the file.
    """

    space: SearchSpace
    singles: Floats
    pairs: Floats
    scores: Mapping[str, Floats]
    fixed_bytes: int
    n_tokens: int
    damage_name: str
    response: Response = Response()
    facts: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_options = int(self._starts[-1])
        shapes = {
            "singles": self.singles.shape,
            **{n: v.shape for n, v in (*self.scores.items(), *self.costs.items())},
        }
        wrong = [name for name, shape in shapes.items() if shape != (n_options,)]
        if wrong or self.pairs.shape != (n_options, n_options):
            raise ValueError(f"Expected {n_options} options, but {wrong or ['pairs']} differ.")

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        counts = [len(choice.options) for choice in self.space.choices]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def bytes_per_option(self) -> Floats:
        """(F,) stored bytes of each option."""
        options = [o.storage_bytes for choice in self.space.choices for o in choice.options]
        return np.asarray(options, dtype=np.float64)

    def total(self, levels: Sequence[int]) -> float:
        """Sum of singles and pairs of an allocation; may be below 0."""
        index = self._starts[:-1] + np.asarray(levels, dtype=np.int64)
        interactions = float(self.pairs[np.ix_(index, index)].sum()) / 2.0
        return float(self.singles[index].sum()) + interactions

    def damage(self, levels: Sequence[int]) -> float:
        """Damage of an allocation without noise, at least 0."""
        return self.response(self.total(levels))

    def storage_bytes(self, levels: Sequence[int]) -> int:
        """Bytes of the whole model."""
        index = self._starts[:-1] + np.asarray(levels, dtype=np.int64)
        return self.fixed_bytes + int(self.bytes_per_option[index].sum())

    def split(self, values: Floats) -> PerChoice:
        """(F,) values as one array per choice."""
        return tuple(np.array(part) for part in np.split(values, self._starts[1:-1]))

    def option_table(self, score: str = SINGLES) -> OptionTable:
        """What a sampler is given to predict from.

        Args:
            score: a name in `scores`, or ``singles``.

        Raises:
            UsageError: no such score.
        """
        known = {**self.scores, SINGLES: self.singles}
        if score not in known:
            raise UsageError(f"The table has no score {score!r}. {nearest(score, known)}")
        choices = self.space.choices
        last = max(1, len(choices) - 1)
        return OptionTable(
            names=tuple(choice.name for choice in choices),
            roles=tuple(choice.layers[0].rpartition(".")[2] for choice in choices),
            depths=tuple(i / last for i in range(len(choices))),
            labels=tuple(tuple(o.label for o in choice.options) for choice in choices),
            damage=self.split(np.maximum(known[score], 0.0)),
            costs={
                STORAGE: self.split(self.bytes_per_option),
                **{name: self.split(values) for name, values in self.costs.items()},
            },
            fixed={STORAGE: float(self.fixed_bytes), **dict.fromkeys(self.costs, 0.0)},
        )

    def resources(self, levels: Sequence[int]) -> dict[str, Resource]:
        """Costs of an allocation by name."""
        index = self._starts[:-1] + np.asarray(levels, dtype=np.int64)
        others = {name: float(values[index].sum()) for name, values in self.costs.items()}
        return _resources({STORAGE: float(self.storage_bytes(levels)), **others})

    def save(self, path: Path) -> None:
        """Write an ``.npz`` without pickled objects: a JSON header and arrays of numbers."""
        header = {
            "format": FORMAT_VERSION,
            "space": self.space.to_json(),
            "fixed_bytes": self.fixed_bytes,
            "n_tokens": self.n_tokens,
            "damage_name": self.damage_name,
            "response": [self.response.gain, self.response.power, self.response.ceiling],
            "scores": list(self.scores),
            "facts": dict(self.facts),
        }
        upper = self.pairs[np.triu_indices(len(self.singles), 1)]
        arrays: dict[str, Any] = {
            "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
            "singles": self.singles,
            "pairs": upper.astype(np.float32),
            **{f"score_{name}": values for name, values in self.scores.items()},
        }
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> ReplayTable:
        """The inverse of `save`; pairs come back as float32 values.

        Raises:
            DataError: the file is not a table of this version.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(arrays["header"].tobytes())
            if header["format"] != FORMAT_VERSION:
                raise ValueError(f"format {header['format']}, not {FORMAT_VERSION}")
            return cls(
                space=SearchSpace.from_json(header["space"]),
                singles=arrays["singles"],
                pairs=_symmetric(arrays["pairs"], len(arrays["singles"])),
                scores={name: arrays[f"score_{name}"] for name in header["scores"]},
                fixed_bytes=int(header["fixed_bytes"]),
                n_tokens=int(header["n_tokens"]),
                damage_name=str(header["damage_name"]),
                response=Response(*header["response"]),
                facts=header["facts"],
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"A replay table is an .npz that benchmarks/measure_table.py wrote, but {path} "
                f"cannot be read as one ({error}). Next step: measure it again."
            ) from error


def _resources(values: Mapping[str, float]) -> dict[str, Resource]:
    units = {STORAGE: "bytes", LATENCY: "ms"}
    return {
        name: Resource(value, units.get(name, ""), "analytic") for name, value in values.items()
    }


def _symmetric(upper: NDArray[np.float32], size: int) -> Floats:
    pairs = np.zeros((size, size))
    pairs[np.triu_indices(size, 1)] = upper
    return pairs + pairs.T


class ReplayDriver:
    """A driver whose trials take microseconds and no model; see `Driver`.

    Args:
        table: answers the trials.
        noise: of measuring on few sequences; None answers without noise.
        racing: stops a noisy trial that its rival clearly beats.
        n_workers: requests that are taken before the first answer, as that many workers would.
    """

    n_gpus = 0.0

    def __init__(
        self,
        table: ReplayTable,
        *,
        noise: SequenceNoise | None = None,
        racing: Racing | None = None,
        n_workers: int = 1,
    ) -> None:
        self.table = table
        self.noise = noise
        self.racing = racing
        self.n_workers = n_workers

    def run(self, requests: Iterator[TrialRequest]) -> Generator[TrialResult, None, None]:
        """Results in the order of the requests."""
        pending: list[TrialRequest] = []
        for request in requests:
            pending.append(request)
            if len(pending) == self.n_workers:
                yield self.answer(pending.pop(0))
        while pending:
            yield self.answer(pending.pop(0))

    def fill(self, wanted: Mapping[str, Sequence[Scheme]]) -> Generator[str, None, None]:
        """There is no bank: nothing to wait for."""
        yield from wanted

    def close(self) -> None:
        """Nothing to free."""

    def answer(self, request: TrialRequest) -> TrialResult:
        """The result of one trial; one outside the space fails, but for the base model."""
        allocation = request.allocation
        space = self.table.space
        if not allocation and allocation not in space:
            base = sum(choice.base_bytes for choice in space.choices) + self.table.fixed_bytes
            others = {
                name: sum(float(part.max()) for part in self.table.split(values))
                for name, values in self.table.costs.items()
            }
            return self._measured(request, 0.0, _resources({STORAGE: float(base), **others}))
        try:
            encoded = space.encode(allocation)
        except SpaceError as error:
            return TrialResult(request, TrialStatus.FAILED, error=str(error))
        levels = [encoded[choice.name] for choice in space.choices]
        return self._measured(request, self.table.damage(levels), self.table.resources(levels))

    def _measured(self, request: TrialRequest, damage: float, costs: Resources) -> TrialResult:
        if self.noise is None:
            quality = self._quality(Measurement(damage, 0.0), self.table.n_tokens)
            metrics = Metrics(quality, costs)
            return TrialResult(request, TrialStatus.COMPLETE, metrics, n_tokens=quality.n_tokens)
        values = self.noise.damages(damage, request.allocation)
        seen = values[: self._seen(values, request)]
        n_tokens = self.table.n_tokens * len(seen) // len(values)
        error = float(seen.std(ddof=1)) / len(seen) ** 0.5
        quality = self._quality(Measurement(float(seen.mean()), error), n_tokens)
        stopped = len(seen) < len(values)
        return TrialResult(
            request,
            TrialStatus.EARLY_STOPPED if stopped else TrialStatus.COMPLETE,
            Metrics(quality, costs),
            n_tokens=n_tokens,
            error="beaten by its rival" if stopped else "",
            damages=tuple(seen.tolist()),
        )

    def _seen(self, values: Floats, request: TrialRequest) -> int:
        """Sequences that are measured before a rival ends the trial."""
        if self.racing is not None and request.bar is not None:
            for end in self.racing.ends(len(values))[:-1]:
                if self.racing.is_beaten(values[:end].tolist(), request.bar):
                    return end
        return len(values)

    def _quality(self, damage: Measurement, n_tokens: int) -> Quality:
        return Quality(
            retained=1.0 - damage.value,
            standard_error=damage.standard_error,
            damage=damage,
            metrics={self.table.damage_name: damage},
            n_tokens=n_tokens,
        )
