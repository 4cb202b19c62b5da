"""One trial: an allocation in, a measured result out, no trace left behind."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core import (
    Allocation,
    Metrics,
    Quality,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.evaluate.forward_plan import with_noise
from autocompress.models.weights import (
    ResidentWeightsError,
    assert_untouched,
    overridden,
    version_counters,
    weight_matrix,
)
from autocompress.search.context import TrialContext

_LONGEST_ERROR = 500
_OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


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
    metrics, status, error, tainted = None, TrialStatus.COMPLETE, "", False
    n_tokens = 0
    notes: tuple[str, ...] = ()
    try:
        quality = _quality(request.allocation, context)
        n_tokens, notes = quality.n_tokens, _notes(request.allocation, context)
        if quality.is_finite:
            metrics = Metrics(quality, context.cost.resources(request.allocation))
        else:
            status, error = TrialStatus.NOT_FINITE, _not_finite(quality)
    except Exception as caught:  # noqa: BLE001 - the worker boundary: every failure is a result
        status, error = _status(caught), _one_line(caught)
    try:
        assert_untouched(context.module, before)
    except ResidentWeightsError as caught:
        metrics, status, error, tainted = None, TrialStatus.FAILED, _one_line(caught), True
    seconds = round(time.perf_counter() - started, 4)  # as the journal keeps it
    result = TrialResult(request, status, metrics, seconds, n_tokens, error, notes=notes)
    return GuardedResult(result, tainted)


def _quality(allocation: Allocation, context: TrialContext) -> Quality:
    weights = _overrides(allocation, context)
    before = {name: weight._version for name, weight in weights.items()}
    with overridden(context.module, context.layout, weights), torch.no_grad():
        quality = context.task.measure(
            context.module, context.split, context.reference, batch_size=context.batch_size
        )
    if any(weight._version != before[name] for name, weight in weights.items()):
        context.bank.forget_dense()
        raise ResidentWeightsError(
            "A task only reads the model, but it wrote to compressed weights that later trials "
            "share. Work on a copy."
        )
    return with_noise(quality, damage=context.noise, retained=context.retained_noise)


def _overrides(allocation: Allocation, context: TrialContext) -> Mapping[str, Tensor]:
    weights = {}
    for name, scheme in allocation.items():
        base = weight_matrix(context.module, context.layout.layer(name))
        weights[name] = context.bank.dense(name, scheme, base.dtype).to(base.device)
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
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error).lower() for words in _OUT_OF_MEMORY_WORDS)
    )
    return TrialStatus.OUT_OF_MEMORY if is_memory else TrialStatus.FAILED


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_LONGEST_ERROR]


def _not_finite(quality: Quality) -> str:
    return (
        f"The compressed model's outputs are not finite: retained quality {quality.retained}, "
        f"damage {quality.damage.value}."
    )
