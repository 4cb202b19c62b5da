"""Trials on long-lived Ray actors, each with the base model and the bank resident.

One copy of the model's memory lies in the object store of each node and is mapped by all workers
there. A trial ships an allocation and brings back numbers.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from autocompress.core import TrialRequest, TrialResult, TrialStatus
from autocompress.core.errors import TrialError, UsageError
from autocompress.drivers import environment
from autocompress.search.context import TrialContext
from autocompress.search.run_trial import GuardedResult, run_guarded
from autocompress.search.shipping import ContextParts, pack_context

environment.prepare()

import ray  # noqa: E402 - reads the environment when it is imported
from ray.exceptions import RayError  # noqa: E402

_log = logging.getLogger(__name__)

MAX_RETRIES = 2
_MAX_START_FAILURES = 3
_STORE_MARGIN = 256 << 20

_Actor = Any  # Ray is not typed
_Ref = Any


class Worker:
    """What an actor is: a context and trials on it."""

    def __init__(self, parts: ContextParts, threads: int) -> None:
        torch.set_num_threads(threads)
        self._context = parts.build()

    def ready(self) -> None:
        """Return once the context is built."""

    def run(self, request: TrialRequest) -> GuardedResult:
        """Run one trial."""
        return run_guarded(request, context=self._context)


@dataclass(frozen=True, slots=True)
class _Job:
    """A trial on its way: how often it was tried, and when this try began."""

    request: TrialRequest
    attempts: int = 1
    started: float = 0.0

    def failed(self, status: TrialStatus, error: str) -> TrialResult:
        seconds = round(time.monotonic() - self.started, 4)
        return TrialResult(
            self.request, status, seconds=seconds, error=error, attempts=self.attempts
        )


class RayDriver:
    """Runs trials on a pool of Ray actors; a context manager.

    A worker that dies is replaced and its trial tried again; a trial that outlives the time limit
    is given up with its worker; a trial that writes to the shared weights fails, and all workers
    start again from clean memory. On a cluster that is short of resources, workers join as they
    start.

    Args:
        context: the resident model, bank and tokens; packed once, built in each worker.
        workers: trials at the same time.
        gpus_per_worker: GPUs that each worker reserves; a fraction lets workers share one.
        address: a cluster to join (``auto`` finds the one of this machine); None starts Ray here,
            or uses the Ray that this process has already started.
        trial_timeout_seconds: longest a trial may run; None for no limit.
        max_retries: how often a trial is tried again after its worker died.

    Raises:
        UsageError: no cluster at `address`, no node can hold a worker, or the context (a task that
            is defined inside a function) cannot be sent to another process.
    """

    def __init__(
        self,
        context: TrialContext,
        *,
        workers: int,
        gpus_per_worker: float = 0.0,
        address: str | None = None,
        trial_timeout_seconds: float | None = None,
        max_retries: int = MAX_RETRIES,
    ) -> None:
        self._n_workers, self._gpus_per_worker = workers, gpus_per_worker
        self._timeout, self._max_retries = trial_timeout_seconds, max_retries
        # Nodes of a cluster need not share a file system.
        self._parts = pack_context(context, with_statistics=address is not None)
        if self._parts.needs_gpu and not gpus_per_worker:
            raise UsageError(
                "The base model is on a GPU, so each Ray worker needs one or a fraction of one. "
                "Next step: add --gpus-per-worker 1, or --device cpu."
            )
        self._owns_ray = start_ray(workers, address=address, n_bytes=self._parts.n_bytes)
        cores = int(ray.cluster_resources().get("CPU", 1))
        self._cpus = max(1, cores // workers)
        self._threads = max(1, min(context.threads, self._cpus))
        self._waiting: dict[_Ref, tuple[_Actor, _Job | None]] = {}
        self._idle: list[_Actor] = []
        self._retry: deque[_Job] = deque()
        self._start_failures = 0
        self._require_room()
        self._memory = ray.put(self._parts)

    def __enter__(self) -> RayDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_workers(self) -> int:
        """Trials that run at the same time."""
        return self._n_workers

    @property
    def n_gpus(self) -> float:
        """GPUs that all workers reserve together."""
        return self._n_workers * self._gpus_per_worker

    def run(self, requests: Iterator[TrialRequest]) -> Generator[TrialResult, None, None]:
        """Results in the order in which they finish.

        Raises:
            TrialError: workers cannot start.
        """
        while len(self._idle) + len(self._waiting) < self._n_workers:
            self._start_worker()
        try:
            while True:
                self._hand_out(requests)
                if self._idle and not any(job for _, job in self._waiting.values()):
                    return
                result = self._collect()
                if result is not None:
                    yield result
        finally:
            self._drop_running()

    def close(self) -> None:
        """Stop the workers, and Ray if this driver started it."""
        if not ray.is_initialized():
            return
        for actor in (*self._idle, *(actor for actor, _ in self._waiting.values())):
            ray.kill(actor)
        self._idle, self._waiting = [], {}
        self._memory = None
        if self._owns_ray:
            stop_ray()

    def _require_room(self) -> None:
        wanted = {"CPU": float(self._cpus), "GPU": self._gpus_per_worker}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(n.get(k, 0.0) >= v for k, v in wanted.items()) for n in nodes):
            self.close()
            raise UsageError(
                f"A worker needs {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs, but no node "
                f"of the Ray cluster has them (most GPUs on a node: "
                f"{max((n.get('GPU', 0.0) for n in nodes), default=0.0):g}). Next step: lower "
                "--gpus-per-worker, or join another cluster with --address."
            )

    def _start_worker(self) -> None:
        actor = (
            ray.remote(Worker)
            .options(
                num_cpus=self._cpus,
                num_gpus=self._gpus_per_worker,
                max_restarts=0,
                runtime_env={"env_vars": dict(environment.WORKER_VARIABLES)},
            )
            .remote(self._memory, self._threads)
        )
        self._waiting[actor.ready.remote()] = (actor, None)

    def _hand_out(self, requests: Iterator[TrialRequest]) -> None:
        while self._idle:
            job = self._retry.popleft() if self._retry else _next_job(requests)
            if job is None:
                return
            actor = self._idle.pop()
            job = replace(job, started=time.monotonic())
            self._waiting[actor.run.remote(job.request)] = (actor, job)

    def _collect(self) -> TrialResult | None:
        """Wait for one thing to happen; a result if a trial ended for good."""
        done, _ = ray.wait(list(self._waiting), num_returns=1, timeout=self._patience())
        if not done:
            return self._give_up_overdue()
        actor, job = self._waiting.pop(done[0])
        if job is None:
            self._welcome(actor, done[0])
            return None
        try:
            outcome: GuardedResult = ray.get(done[0])
        except RayError as error:
            return self._after_death(actor, job, error)
        if outcome.tainted:
            self._replace_all(actor)
        else:
            self._idle.append(actor)
        return replace(outcome.result, attempts=job.attempts)

    def _patience(self) -> float | None:
        """Seconds until the next trial is overdue."""
        started = [job.started for _, job in self._waiting.values() if job]
        if self._timeout is None or not started:
            return None
        return max(0.0, min(started) + self._timeout - time.monotonic())

    def _give_up_overdue(self) -> TrialResult | None:
        limit = self._timeout or 0.0
        for ref, (actor, job) in self._waiting.items():
            if job is not None and time.monotonic() - job.started >= limit:
                del self._waiting[ref]
                self._replace(actor)
                return job.failed(
                    TrialStatus.TIMED_OUT,
                    f"The trial ran longer than the limit of {limit:g} s and was stopped.",
                )
        return None

    def _welcome(self, actor: _Actor, ref: _Ref) -> None:
        try:
            ray.get(ref)
        except RayError as error:
            self._start_failures += 1
            if self._start_failures >= _MAX_START_FAILURES:
                raise TrialError(
                    f"Ray workers cannot start; {self._start_failures} in a row failed. The last "
                    f"one says: {_last_line(error)} Next step: try --driver local, which shows "
                    "the same error with its cause."
                ) from error
            self._replace(actor)
        else:
            self._start_failures = 0
            self._idle.append(actor)

    def _after_death(self, actor: _Actor, job: _Job, error: RayError) -> TrialResult | None:
        _log.warning("The worker of trial %d died: %s", job.request.number, _last_line(error))
        self._replace(actor)
        if job.attempts <= self._max_retries:
            self._retry.append(replace(job, attempts=job.attempts + 1))
            return None
        return job.failed(
            TrialStatus.WORKER_DIED,
            f"Its worker died in each of {job.attempts} attempts: {_last_line(error)}",
        )

    def _replace(self, actor: _Actor) -> None:
        ray.kill(actor)
        self._start_worker()

    def _replace_all(self, tainted: _Actor) -> None:
        """Clean memory for everyone: what one worker wrote, all workers of its node have read."""
        others = [*self._idle, *(actor for actor, _ in self._waiting.values())]
        self._retry.extend(job for _, job in self._waiting.values() if job)
        self._idle, self._waiting = [], {}
        self._memory = ray.put(self._parts)
        for actor in (tainted, *others):
            self._replace(actor)

    def _drop_running(self) -> None:
        self._retry.clear()
        for ref, (actor, job) in list(self._waiting.items()):
            if job is not None:
                del self._waiting[ref]
                ray.kill(actor)


def _next_job(requests: Iterator[TrialRequest]) -> _Job | None:
    request = next(requests, None)
    return None if request is None else _Job(request)


def start_ray(workers: int, *, address: str | None = None, n_bytes: int = 0) -> bool:
    """Make sure that Ray runs in this process.

    Args:
        workers: CPUs to claim at least, if Ray is started here.
        address: a cluster to join; None starts Ray on this machine.
        n_bytes: what the object store has to hold.

    Returns:
        True if Ray was started or joined now, False if this process had already done so.

    Raises:
        UsageError: there is no cluster at `address`.
    """
    if ray.is_initialized():
        return False
    quiet = {"logging_level": "error", "log_to_driver": False}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"There is no Ray cluster at {address!r}: {_last_line(error)} Next step: start "
                "one with `ray start --head`, or leave out --address."
            ) from error
        return True
    ray.init(
        num_cpus=max(workers, _cores()),
        include_dashboard=False,
        object_store_memory=n_bytes + n_bytes // 4 + _STORE_MARGIN,
        **quiet,
    )
    return True


def stop_ray() -> None:
    """Leave the cluster; end it if this process started it."""
    ray.shutdown()


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
