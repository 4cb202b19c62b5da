"""Trials as Ray Tune shows them, configs and rows of numbers, and back to values; needs no Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from autocompress.core import (
    BASE_ALLOCATION,
    DAMAGE,
    DEFAULT_OBJECTIVES,
    Objectives,
    TrialRequest,
    TrialResult,
)
from autocompress.core.errors import SpaceError, UsageError, nearest
from autocompress.fronts import Front
from autocompress.search.sampler import Constraints
from autocompress.spaces import SearchSpace

RESULT = "trial_result"
"""What a trial reports its `TrialResult` as, in JSON."""

TRIAL = "trial"
"""Where a config says number and source of its trial."""

_SIGNS = {"min": 1.0, "max": -1.0}


def trials_of(results: Iterable[Any]) -> list[TrialResult]:
    """The trials of a `ResultGrid` that reported anything, with what they reported last."""
    found = (reported(result.metrics or {}) for result in results)
    return [trial for trial in found if trial is not None]


def front_of(
    results: Iterable[Any],
    *,
    metric: str = DAMAGE,
    mode: str = "min",
    constraints: Constraints | None = None,
    optimize: str = DEFAULT_OBJECTIVES.text,
) -> list[TrialResult]:
    """The complete trials that no other complete trial beats on all objectives.

    Args:
        results: what ``Tuner.fit`` or ``Tuner.get_results`` returns.
        metric: the objective beside the resources, as given to the searcher.
        mode: ``min`` or ``max``, likewise.
        constraints: as given to the searcher; a trial with a value above 0 is left out.
        optimize: as given to the searcher.

    Returns:
        By descending quality. Early-stopped and failed trials are never among them.
    """
    sign, objectives = sign_of(mode), Objectives.parse(optimize)
    candidates = []
    for result in results:
        trial = reported(result.metrics or {})
        if trial is None or trial.metrics is None or not trial.is_complete:
            continue
        if constraints is None or max(constraints(trial).values(), default=0.0) <= 0:
            loss = sign * float(result.metrics.get(metric, math.nan))
            candidates.append((trial, (loss, *objectives.costs(trial.metrics))))
    return [trial for trial, _ in Front.of(candidates, lambda pair: pair[1])]


def config_of(request: TrialRequest, space: SearchSpace) -> dict[str, Any]:
    """What Tune shows as hyperparameters: labels by choice, and where they come from."""
    if request.allocation == BASE_ALLOCATION:
        labels = dict.fromkeys((choice.name for choice in space.choices), "base")
    else:
        levels = space.encode(request.allocation)
        labels = {c.name: c.options[levels[c.name]].label for c in space.choices}
    return {**labels, TRIAL: {"number": request.number, "source": request.source}}


def request_of(config: Mapping[str, Any], space: SearchSpace) -> TrialRequest:
    """The inverse of `config_of`; configs of other searchers need not say number and source."""
    known = {choice.name for choice in space.choices}
    levels: dict[str, int] = {}
    for choice in space.choices:
        label = config.get(choice.name)
        labels = [option.label for option in choice.options]
        if label in labels:
            levels[choice.name] = labels.index(label)
        elif label != "base":
            raise SpaceError(
                f"A config gives one of its labels to each choice of the space {space.name!r}, but "
                f"{choice.name!r} got {label!r}. {nearest(str(label), labels)}"
            )
    is_base = len(levels) < len(known)
    if is_base and any(config[name] != "base" for name in known):
        raise SpaceError(
            f"The space {space.name!r} does not offer 'base' for each choice, so a config must "
            "name 'base' for all choices or for none."
        )
    allocation = BASE_ALLOCATION if is_base else space.decode(levels)
    trial = config.get(TRIAL, {})
    return TrialRequest(int(trial.get("number", 0)), allocation, str(trial.get("source", "tune")))


def row_of(result: TrialResult, resources: Iterable[str]) -> dict[str, Any]:
    """What Tune shows of a result; numbers that a failed trial lacks are NaN."""
    row: dict[str, Any] = dict.fromkeys(resources, math.nan)
    row |= {DAMAGE: math.nan, "retained_quality": math.nan}
    if result.metrics is not None:
        quality = result.metrics.quality
        row |= {name: m.value for name, m in quality.metrics.items()}
        row |= {name: resource.value for name, resource in result.metrics.resources.items()}
        row |= {DAMAGE: quality.damage.value, "retained_quality": quality.retained}
    row |= {"tokens": result.n_tokens, "trial_status": str(result.status), "message": result.error}
    return row | {RESULT: json.dumps(result.to_json(), separators=(",", ":"))}


def reported(row: Mapping[str, Any]) -> TrialResult | None:
    """The result in a row, flat or not; None if the trial reported none."""
    return TrialResult.from_json(json.loads(row[RESULT])) if RESULT in row else None


def sign_of(mode: str) -> float:
    """What makes a metric of this mode a loss.

    Raises:
        UsageError: the mode is neither ``min`` nor ``max``.
    """
    if mode not in _SIGNS:
        raise UsageError(f"The mode of a metric is 'min' or 'max', but got {mode!r}.")
    return _SIGNS[mode]
