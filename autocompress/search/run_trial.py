"""One trial: an allocation in, a measured result out, no trace left behind."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autocompress.core import (
    BASE_ALLOCATION,
    Allocation,
    Metrics,
    Quality,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.evaluate.forward_plan import with_noise
from autocompress.evaluate.task import Scores, join
from autocompress.models.weights import (
    ResidentWeightsError,
    assert_untouched,
    overridden,
    version_counters,
    weight_matrix,
)
from autocompress.search.context import Piece, TrialContext
from autocompress.search.memory import is_out_of_memory

_LONGEST_ERROR = 500


def run_trial(request: TrialRequest, *, context: TrialContext) -> TrialResult:
    """Measure an allocation with the resident model.

    A pure function of the allocation and the context but for the seconds. Whatever goes wrong is
    a status of the result, never an exception, and the base model is as it was before.
    """
    return run_guarded(request, context=context).result


@dataclass(frozen=True, slots=True)
class GuardedResult:
    """A result, and whether the trial wrote to the base model.

    Attributes:
        result: failed if it did.
        tainted: the context must not run further trials.
    """

    result: TrialResult
    tainted: bool


def run_guarded(request: TrialRequest, *, context: TrialContext) -> GuardedResult:
    """As `run_trial`, and says whether the shared weights are still those of the base model."""
    started = time.perf_counter()
    before = version_counters(context.module)
    tainted = False
    try:
        result = _result(request, context)
    except Exception as caught:  # noqa: BLE001 - the worker boundary: every failure is a result
        result = TrialResult(request, _status(caught), error=_one_line(caught))
    try:
        assert_untouched(context.module, before)
    except ResidentWeightsError as caught:
        result = replace(
            result, status=TrialStatus.FAILED, metrics=None, error=_one_line(caught), damages=()
        )
        tainted = True
    seconds = round(time.perf_counter() - started, 4)  # as the journal keeps it
    return GuardedResult(replace(result, seconds=seconds), tainted)


def _result(request: TrialRequest, context: TrialContext) -> TrialResult:
    seen = _measure(request, context)
    quality = seen.quality
    metrics, error = None, ""
    if quality.is_finite:
        metrics = Metrics(quality, context.cost.resources(request.allocation))
    if seen.beaten_by is not None:
        status, error = TrialStatus.EARLY_STOPPED, _beaten(seen, context)
    elif metrics is not None:
        status = TrialStatus.COMPLETE
    else:
        status, error = TrialStatus.NOT_FINITE, _not_finite(request, quality)
    return TrialResult(
        request,
        status,
        metrics,
        n_tokens=quality.n_tokens,
        error=error,
        notes=_notes(request.allocation, context),
        damages=() if status is TrialStatus.NOT_FINITE else seen.damages,
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """What a trial saw.

    Attributes:
        quality: on the sequences that were measured.
        damages: of each of them, rounded as the journal keeps them.
        beaten_by: number of the rival that ended the race; None if it was run to the end.
    """

    quality: Quality
    damages: tuple[float, ...]
    beaten_by: int | None


def _measure(request: TrialRequest, context: TrialContext) -> _Measured:
    weights = _overrides(request.allocation, context)
    before = {name: weight._version for name, weight in weights.items()}
    inputs = context.bank.input_maps(request.allocation)
    with overridden(context.module, context.layout, weights, inputs), torch.no_grad():
        measured = _race(request, context)
    if any(weight._version != before[name] for name, weight in weights.items()):
        context.bank.forget_dense()
        context.prefix.clear()
        raise ResidentWeightsError(
            "A task only reads the model, but it wrote to compressed weights that later trials "
            "share. Work on a copy."
        )
    return measured


def _race(request: TrialRequest, context: TrialContext) -> _Measured:
    """Rung by rung; ends early if the trial is beaten, or broken: NaN stays NaN."""
    task, bar = context.task, request.bar
    pieces: list[Scores] = []
    for index, rung in enumerate(context.rungs):
        with context.prefix.sharing(request.allocation, part=index):
            pieces.append(_score(rung.new, context))
        scores = join(pieces)
        damages = task.damages(scores)
        is_beaten = rung is not context.rungs[-1] and _is_beaten(damages, request, context)
        if is_beaten or not bool(damages.isfinite().all()):
            break
    return _Measured(
        with_noise(
            task.summarise(scores, rung.so_far.split, rung.so_far.reference),
            damage=context.noise,
            retained=context.retained_noise,
        ),
        damages=tuple(float(f"{damage:.7g}") for damage in damages.tolist()),
        beaten_by=bar.trial if is_beaten and bar else None,
    )


def _score(piece: Piece, context: TrialContext) -> Scores:
    return context.task.score(
        context.module, piece.split, piece.reference, batch_size=context.batch_size
    )


def _is_beaten(damages: Tensor, request: TrialRequest, context: TrialContext) -> bool:
    if context.racing is None or request.bar is None or not bool(damages.isfinite().all()):
        return False
    return context.racing.is_beaten(damages.tolist(), request.bar)


def _overrides(allocation: Allocation, context: TrialContext) -> Mapping[str, Tensor]:
    weights = {}
    context.bank.prepare(allocation)
    for name, scheme in allocation.items():
        base = weight_matrix(context.module, context.layout.layer(name))
        weights[name] = context.bank.dense(name, scheme, base.dtype)
    return weights


def _notes(allocation: Allocation, context: TrialContext) -> tuple[str, ...]:
    """What the methods said, each note once with the layers that it concerns."""
    layers: dict[str, list[str]] = {}
    for name, scheme in allocation.items():
        for note in context.bank.notes(name, scheme):
            layers.setdefault(note, []).append(name)
    return tuple(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {note}"
        for note, names in layers.items()
    )


def _status(error: Exception) -> TrialStatus:
    return TrialStatus.OUT_OF_MEMORY if is_out_of_memory(error) else TrialStatus.FAILED


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_LONGEST_ERROR]


def _beaten(seen: _Measured, context: TrialContext) -> str:
    return (
        f"Stopped after {len(seen.damages)} of {len(context.split)} sequences: clearly more damage "
        f"than trial {seen.beaten_by}, which takes no more of what is optimized."
    )


def _not_finite(request: TrialRequest, quality: Quality) -> str:
    model = "base" if request.allocation == BASE_ALLOCATION else "compressed"
    return (
        f"The {model} model's outputs are not finite: retained quality {quality.retained}, "
        f"damage {quality.damage.value}."
    )
