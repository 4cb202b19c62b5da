"""Everything that one search was asked to do, as a value that `study.yaml` keeps."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from autocompress.core import DEFAULT_OBJECTIVES, Objectives
from autocompress.core.errors import (
    ModelError,
    RunDirectoryError,
    UsageError,
    nearest,
)
from autocompress.core.files import write_atomically
from autocompress.evaluate.data import CORPORA
from autocompress.export.targets import TARGETS

STUDY_FILE = "study.yaml"
ROTATIONS = ("none", "hadamard")
_PACKAGE = "package:"
CACHE_FOLDER = "cache"


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """The arguments of a search.

    Attributes:
        model: a directory, a hub id, or ``package:NAME/SUBFOLDER`` for a model that an installed
            Python package carries.
        task: name of a task, or ``auto`` to read it from the model's config.
        data: a file, a `datasets` directory or hub name, or a built-in (``python-docs``,
            ``digits``); ``auto`` takes the task's own default.
        space: name of a shipped search space or path of a YAML file.
        target: where the compressed model is to run; the space loses what cannot run there.
        rotate: ``hadamard`` rotates the residual stream of the base model before anything else;
            quality and size stay relative to the model as it was given.
        sampler: name of a sampler, see ``autocompress samplers``.
        budget: limits, each like ``200 trials``, ``30m`` or ``2e6 tokens``; the first one reached
            ends the search. Time includes the preparation, and leaves some for the report tokens.
        driver: ``local`` or ``ray``.
        workers: trials that run at the same time (Ray only).
        gpus_per_worker: GPUs, or a fraction of one, that each Ray worker reserves.
        address: a Ray cluster to join (``auto``); None starts Ray on this machine.
        seed: of the splits and the sampler.
        device: torch device of the forwards.
        dtype: dtype of the search-time forwards; ``auto`` measures which one is fastest here.
        calibration_tokens: tokens for layer statistics.
        search_tokens: tokens that every trial is measured on.
        report_tokens: held-out tokens that the published front is measured on.
        sequence_length: tokens per sequence.
        trial_timeout_seconds: a trial that runs longer is given up (Ray only); None for no limit.
        device_profile: device of the latency: a name that ships, or a ``.json`` file that
            `autocompress device` wrote.
        trust_remote_code: allow code from the model repository to run.
        token_weighting: how tokens count in layer statistics: ``gradient`` by the gradient that
            reaches them, ``none`` all alike (an embedding that is not the head has no statistics
            then).
        cache: directory of statistics, bank and option tables; None: in the run directory. Runs
            may share one.
        bank_size: largest size of the bank on disk, e.g. ``20GB``; None for the default.
        aim: sizes, each like ``60MB``, at which the best model is wanted most; without any, those
            of the baselines. Times, like ``3ms``, where latency is the first resource.
        optimize: ``quality`` and the resources that it is traded for, the main one first.
        finalize: rebuild the member that a pick by cost efficiency gives, once the search ended.
    """

    model: str
    task: str = "auto"
    data: str = "auto"
    space: str = "joint"
    target: str = "any"
    rotate: str = "none"
    sampler: str = "guided"
    budget: tuple[str, ...] = ("100 trials",)
    driver: str = "local"
    workers: int = 1
    gpus_per_worker: float = 0.0
    address: str | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"
    calibration_tokens: int = 8192
    search_tokens: int = 4096
    report_tokens: int = 8192
    sequence_length: int = 256
    trial_timeout_seconds: float | None = None
    device_profile: str = "cpu-2core-avx512"
    trust_remote_code: bool = False
    token_weighting: str = "gradient"
    cache: str | None = None
    bank_size: str | None = None
    aim: tuple[str, ...] = ()
    finalize: bool = True
    optimize: str = DEFAULT_OBJECTIVES.text

    def __post_init__(self) -> None:
        for name in ("workers", "calibration_tokens", "search_tokens", "report_tokens"):
            _require_at_least(name, getattr(self, name), 1)
        _require_at_least("sequence_length", self.sequence_length, 8)
        _require_at_least("gpus_per_worker", self.gpus_per_worker, 0)
        _require_one_of("target", self.target, tuple(TARGETS))
        _require_one_of("rotate", self.rotate, ROTATIONS)
        _require_one_of("driver", self.driver, ("local", "ray"))
        _require_one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _require_one_of("token_weighting", self.token_weighting, ("gradient", "none"))
        if self.driver == "local" and (self.workers > 1 or self.address or self.gpus_per_worker):
            raise UsageError(
                "The local driver runs one trial at a time in this process, but workers, an "
                "address or GPUs per worker were given. Next step: add --driver ray."
            )
        self._check_timeout()
        # Spelled alike, however it was typed: settings are compared on a resume.
        object.__setattr__(self, "optimize", Objectives.parse(self.optimize).text)

    def _check_timeout(self) -> None:
        limit = self.trial_timeout_seconds
        if limit is not None and not 0 < limit < math.inf:
            raise UsageError(
                f"--trial-timeout must be finite and more than 0 seconds, but got {limit:g}. Next "
                "step: give what a trial may take, or leave it away for no limit."
            )
        if limit is not None and self.driver == "local":
            raise UsageError(
                "The local driver runs trials in this process and cannot stop one, but "
                f"--trial-timeout {limit:g} was given. Next step: add --driver ray, or leave the "
                "limit away."
            )

    @property
    def objectives(self) -> Objectives:
        """What `optimize` says."""
        return Objectives.parse(self.optimize)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return {**asdict(self), "budget": list(self.budget), "aim": list(self.aim)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchSettings:
        """The inverse of `to_json`; raises `UsageError` for an unknown key."""
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise UsageError(f"Unknown setting {name!r}. {nearest(name, known)}")
        # Runs of version 0.1 do not say how tokens counted: all alike.
        values = {"token_weighting": "none", **data}
        values |= {"budget": tuple(data["budget"]), "aim": tuple(data.get("aim", ()))}
        if data.get("driver", "local") == "local":
            values["trial_timeout_seconds"] = None  # older runs may have one, which nothing kept
        return cls(**values)

    def with_resolved(self, *, task: str, data: str) -> SearchSettings:
        """The same settings with `auto` replaced by what it stood for."""
        return replace(self, task=task, data=data)


# A resumed search may run longer, elsewhere or with more workers, and is still the same study.
_MAY_CHANGE_ON_RESUME = frozenset(
    {
        "budget",
        "driver",
        "workers",
        "gpus_per_worker",
        "address",
        "trial_timeout_seconds",
        "cache",
        "bank_size",
        "finalize",
    }
)


def require_same_study(old: SearchSettings, new: SearchSettings) -> None:
    """Refuse to resume a study under settings that would make its trials incomparable.

    Raises:
        UsageError: naming each setting that differs.
    """
    differing = [
        f"{_option(f.name)} (was {getattr(old, f.name)!r}, now {getattr(new, f.name)!r})"
        for f in fields(SearchSettings)
        if f.name not in _MAY_CHANGE_ON_RESUME
        and getattr(old, f.name) != getattr(new, f.name)
        and getattr(new, f.name) != "auto"
    ]
    if differing:
        may = [_option(f.name) for f in fields(SearchSettings) if f.name in _MAY_CHANGE_ON_RESUME]
        raise UsageError(
            "A resumed search keeps its settings, but these differ: "
            f"{'; '.join(differing)}. Only {', '.join(may[:-1])} and {may[-1]} may change. Next "
            "step: give the old values, or search into a new --out directory."
        )


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """What `study.yaml` holds: the settings and what they resolved to on the first run."""

    settings: SearchSettings
    resolved: Mapping[str, Any]

    def write(self, directory: Path) -> None:
        """Write `study.yaml` by atomic rename, with the way from there to the working directory."""
        text = yaml.safe_dump(
            {
                "settings": self.settings.to_json(),
                "resolved": dict(self.resolved),
                "started_in": os.path.relpath(Path.cwd(), directory.resolve()),
            },
            sort_keys=False,
        )
        write_atomically(directory / STUDY_FILE, text)

    @classmethod
    def read(cls, directory: Path) -> StudyRecord:
        """Read `study.yaml`; relative paths are those from the current working directory.

        Raises:
            RunDirectoryError: there is none, or it is damaged.
        """
        path = directory / STUDY_FILE
        if not path.is_file():
            raise RunDirectoryError(
                f"A run directory holds {STUDY_FILE}, but {directory} does not. Next step: give "
                "the --out directory of an earlier `autocompress search`."
            )
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            settings = SearchSettings.from_json(data["settings"])
            if "started_in" in data:  # not in runs of older versions
                settings = _seen_from_here(settings, directory.resolve() / data["started_in"])
            return cls(settings, data["resolved"])
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise RunDirectoryError(
                f"{path} is damaged ({type(error).__name__}: {error}). Next step: restore it from "
                "a backup, or search into a new --out directory."
            ) from error


_PATHS = ("model", "data", "space", "device_profile", "cache")


def _seen_from_here(settings: SearchSettings, start: Path) -> SearchSettings:
    """The settings with the relative paths that hold from `start`, but not from here, rewritten."""
    values = {name: getattr(settings, name) for name in _PATHS}
    moved = {
        name: os.path.relpath(start / value)
        for name, value in values.items()
        if value and not Path(value).exists() and _is_path(name, start / value)
    }
    return replace(settings, **moved)


def _is_path(name: str, path: Path) -> bool:
    """Whether a search that looked there took a setting for this path, not for a name."""
    if name in ("space", "device_profile"):
        return path.is_file()
    return path.exists() and not (name == "data" and path.name in CORPORA)


def cache_directory(settings: SearchSettings, directory: Path) -> Path:
    """Where statistics, bank and option tables of a run lie."""
    return directory / CACHE_FOLDER if settings.cache is None else Path(settings.cache)


def resolve_model(source: str) -> str:
    """The directory that ``package:NAME/SUBFOLDER`` stands for; other sources are left alone.

    Raises:
        ModelError: the package or the folder in it does not exist.
    """
    if not source.startswith(_PACKAGE):
        return source
    name, _, subfolder = source.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{source!r} names the Python package {name!r}, which is not installed here. Next "
            f"step: pip install {name.replace('_', '-')}."
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / subfolder
    if not folder.is_dir():
        inside = (p.name for p in folder.parent.iterdir() if p.is_dir())
        raise ModelError(f"{source!r}: no folder {folder}. {nearest(folder.name, inside)}")
    return str(folder)


def _option(name: str) -> str:
    """What the command line calls a setting."""
    return name if name == "model" else f"--{name.removesuffix('_seconds').replace('_', '-')}"


def _require_at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise UsageError(f"{_option(name)} must be at least {least}, but got {value}.")


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"Unknown {_option(name)} {value!r}. {nearest(value, known)}")
