"""Trials as values: what is asked of a worker and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from autocompress.core.allocation import Allocation
from autocompress.core.metrics import Metrics


class TrialStatus(StrEnum):
    """How a trial ended."""

    COMPLETE = "complete"
    EARLY_STOPPED = "early_stopped"
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    TIMED_OUT = "timed_out"
    WORKER_DIED = "worker_died"


_TRANSIENT = frozenset({TrialStatus.OUT_OF_MEMORY, TrialStatus.TIMED_OUT, TrialStatus.WORKER_DIED})


@dataclass(frozen=True, slots=True)
class Bar:
    """What a trial has to beat to be measured on all sequences: a rival of no more cost.

    Attributes:
        trial: number of the rival.
        damages: the rival's damage of each sequence, see `TrialResult.damages`.
    """

    trial: int
    damages: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """All that a trial depends on besides the worker's resident model, bank and tokens.

    Attributes:
        number: order of the ask; names the trial, never seeds it.
        allocation: what to evaluate.
        source: who proposed it: ``baseline:base``, ``baseline:uniform-4bit``, ``sampler:tpe``.
        bar: what may stop the trial early; no part of a request's identity, as it depends on what
            other workers have finished.
    """

    number: int
    allocation: Allocation
    source: str
    bar: Bar | None = field(default=None, compare=False)

    @property
    def is_baseline(self) -> bool:
        """True for the base model and the uniform allocations."""
        return self.source.startswith("baseline:")

    @property
    def baseline_name(self) -> str | None:
        """``uniform-4bit`` for ``baseline:uniform-4bit``; None for a sampler's proposal."""
        return self.source.partition(":")[2] if self.is_baseline else None


@dataclass(frozen=True, slots=True)
class Elapsed:
    """What a study has spent of time, all of its runs together.

    Attributes:
        seconds: wall time.
        gpu_seconds: wall time times the GPUs that were held meanwhile.
    """

    seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: Elapsed) -> Elapsed:
        return Elapsed(self.seconds + other.seconds, self.gpu_seconds + other.gpu_seconds)

    def to_json(self) -> dict[str, float]:
        """A JSON object that `from_json` reads back."""
        return {"seconds": self.seconds, "gpu_seconds": self.gpu_seconds}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Elapsed:
        """The inverse of `to_json`."""
        return cls(float(data["seconds"]), float(data["gpu_seconds"]))


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A finished trial.

    Attributes:
        request: what was asked.
        status: how it ended; only ``complete`` and ``early_stopped`` carry metrics.
        metrics: measured on search tokens; of an early-stopped trial on those that it saw, None
            where so few give no estimate.
        seconds: wall time in the worker.
        n_tokens: tokens spent.
        error: one line for people on why it is not complete; else empty.
        attempts: how often it was tried (a dead worker's trial is retried).
        notes: what methods said, e.g. a fallback and its reason.
        sampler_state: opaque to all but the sampler that wrote it (NSGA-II generations).
        damages: damage of each sequence that was measured, in the split's order, summed over its
            tokens (nats for a language model).
        elapsed: what the study had spent when this trial was journaled; None if it did not say.
    """

    request: TrialRequest
    status: TrialStatus
    metrics: Metrics | None = None
    seconds: float = 0.0
    n_tokens: int = 0
    error: str = ""
    attempts: int = 1
    notes: tuple[str, ...] = ()
    sampler_state: Mapping[str, Any] = field(default_factory=dict)
    damages: tuple[float, ...] = ()
    elapsed: Elapsed | None = None

    @property
    def is_complete(self) -> bool:
        """True if the trial carries metrics of all search tokens."""
        return self.status is TrialStatus.COMPLETE and self.metrics is not None

    @property
    def is_early_stopped(self) -> bool:
        """True if the trial was clearly beaten before it had seen all search tokens."""
        return self.status is TrialStatus.EARLY_STOPPED

    @property
    def has_failed(self) -> bool:
        """True if something went wrong: neither complete nor stopped early."""
        return not self.is_complete and not self.is_early_stopped

    @property
    def is_transient(self) -> bool:
        """True if it failed for a reason that may have passed: memory, time or its worker."""
        return self.status in _TRANSIENT

    def to_json(self) -> dict[str, Any]:
        """One line of the journal."""
        return {
            "number": self.request.number,
            "id": self.request.allocation.digest,
            "source": self.request.source,
            "status": self.status.value,
            "seconds": round(self.seconds, 4),
            "tokens": self.n_tokens,
            "attempts": self.attempts,
            "error": self.error,
            "notes": list(self.notes),
            "metrics": self.metrics.to_json() if self.metrics else None,
            "allocation": self.request.allocation.to_json(),
            "sampler_state": dict(self.sampler_state),
            "damages": list(self.damages),
            **({"elapsed": self.elapsed.to_json()} if self.elapsed else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialResult:
        """The inverse of `to_json`."""
        allocation = Allocation.from_json(data["allocation"])
        return cls(
            request=TrialRequest(int(data["number"]), allocation, str(data["source"])),
            status=TrialStatus(data["status"]),
            metrics=Metrics.from_json(data["metrics"]) if data["metrics"] else None,
            seconds=float(data["seconds"]),
            n_tokens=int(data["tokens"]),
            error=str(data["error"]),
            attempts=int(data["attempts"]),
            notes=tuple(data["notes"]),
            sampler_state=dict(data["sampler_state"]),
            damages=tuple(map(float, data.get("damages", ()))),  # journals of version 0.1 have none
            elapsed=Elapsed.from_json(data["elapsed"]) if "elapsed" in data else None,
        )
