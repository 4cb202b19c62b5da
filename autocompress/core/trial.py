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
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    TIMED_OUT = "timed_out"
    WORKER_DIED = "worker_died"


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """All that a trial depends on besides the worker's resident model, bank and tokens.

    Attributes:
        number: order of the ask; names the trial, never seeds it.
        allocation: what to evaluate.
        source: who proposed it: ``baseline:base``, ``baseline:uniform-4bit``, ``sampler:tpe``.
    """

    number: int
    allocation: Allocation
    source: str

    @property
    def is_baseline(self) -> bool:
        """True for the base model and the uniform allocations."""
        return self.source.startswith("baseline:")

    @property
    def baseline_name(self) -> str | None:
        """``uniform-4bit`` for ``baseline:uniform-4bit``; None for a sampler's proposal."""
        return self.source.partition(":")[2] if self.is_baseline else None


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A finished trial.

    Attributes:
        request: what was asked.
        status: how it ended; only ``complete`` carries metrics.
        metrics: measured on search tokens.
        seconds: wall time in the worker.
        n_tokens: tokens spent.
        error: one line for people; empty when complete.
        attempts: how often it was tried (a dead worker's trial is retried).
        notes: what methods said, e.g. a fallback and its reason.
        sampler_state: opaque to all but the sampler that wrote it (NSGA-II generations).
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

    @property
    def is_complete(self) -> bool:
        """True if the trial carries metrics."""
        return self.status is TrialStatus.COMPLETE and self.metrics is not None

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
        )
