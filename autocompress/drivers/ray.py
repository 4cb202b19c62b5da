"""Trials on long-lived Ray actors, each with the base model and the bank resident.

One copy of the model's memory lies in the object store of each node and is mapped by all workers
there. A trial ships an allocation and brings back numbers; layers are compressed into the bank.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from autocompress.core import Scheme, TrialRequest, TrialResult, TrialStatus
from autocompress.core.errors import TrialError, UsageError
from autocompress.core.machine import usable_cores
from autocompress.drivers import environment
from autocompress.drivers.ray_cluster import (
    alive_nodes,
    last_line,
    node_of_driver,
    start_ray,
    stop_ray,
)
from autocompress.drivers.ray_placement import Placement, place_workers
from autocompress.search.context import TrialContext
from autocompress.search.run_trial import GuardedResult, run_guarded
from autocompress.search.shipping import ContextParts, pack_context

environment.prepare()

import ray  # noqa: E402 - reads the environment when it is imported
from ray.exceptions import RayError, RayTaskError  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

__all__ = ["MAX_RETRIES", "RayDriver", "start_ray", "stop_ray"]

_log = logging.getLogger(__name__)

MAX_RETRIES = 2
_MAX_START_FAILURES = 3

_Actor = Any  # Ray is not typed
_Ref = Any


class Worker:
    """What an actor is: a context and trials on it."""

    def __init__(self, parts: ContextParts, threads: int) -> None:
        threads = min(threads, usable_cores())
        torch.set_num_threads(threads)
        self._context = replace(parts.build(), threads=threads, cores=threads)

    def ready(self) -> None:
        """Return once the context is built."""

    def run(self, request: TrialRequest) -> GuardedResult:
        """Run one trial."""
        return run_guarded(request, context=self._context)

    def fill(self, wanted: Mapping[str, Sequence[Scheme]]) -> None:
        """Compress layers into the bank."""
        context = self._context
        for _ in context.bank.fill_by_layer(wanted, n_threads=context.fill_threads):
            pass


@dataclass(frozen=True, slots=True)
class _Job:
    """What a worker is at: how often it was tried, and when this try began.

    Attributes:
        call: the method of `Worker`.
        work: its argument.
        name: for people.
        limit: seconds that it may take.
    """

    call: str
    work: Any
    name: str
    limit: float = math.inf
    attempts: int = 1
    started: float = 0.0

    @property
    def overdue_at(self) -> float:
        return self.started + self.limit


class RayDriver:
    """Runs trials on a pool of Ray actors; a context manager.

    A worker that dies is replaced and its trial tried again; a trial that outlives the time limit
    is given up with its worker; a trial that writes to the shared weights fails, and all workers
    start again from clean memory. Each worker has as many CPUs, and threads, as let all of them run
    on the nodes that are there; on a cluster that is short of resources, workers join as they
    start.

    Args:
        context: the resident model, bank and tokens; packed once, built in each worker.
        workers: trials at the same time.
        gpus_per_worker: GPUs that each worker reserves; a fraction lets workers share one.
        address: a cluster to join (``auto`` finds the one of this machine); None starts Ray here,
            or uses the Ray that this process has already started.
        trial_timeout_seconds: longest a trial may run; None for no limit.
        max_retries: how often a trial or layer is tried again after its worker died.
        max_threads: of a worker; None for as many as the CPUs that it reserves.

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
        max_threads: int | None = None,
    ) -> None:
        self._n_workers, self._gpus_per_worker = workers, gpus_per_worker
        self._timeout, self._max_retries = trial_timeout_seconds, max_retries
        self._parts = pack_context(context)
        if self._parts.needs_gpu and not gpus_per_worker:
            raise UsageError(
                "The base model is on a GPU, so each Ray worker needs one or a fraction of one. "
                "Next step: add --gpus-per-worker 1, or --device cpu."
            )
        self._owns_ray = start_ray(workers, address=address, n_bytes=self._parts.n_bytes)
        self._waiting: dict[_Ref, tuple[_Actor, _Job | None]] = {}
        self._idle: list[_Actor] = []
        self._retry: deque[_Job] = deque()
        self._start_failures = 0
        self._placement = self._place(may_grow=address is not None or not self._owns_ray)
        self._threads = min(self._placement.cpus, max_threads or self._placement.cpus)
        self._layers_at_once = 1 if self._parts.needs_gpu else self._threads
        if self._placement.node is None:  # nodes of a cluster need not share a file system
            self._parts = pack_context(context, with_statistics=True)
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
        limit = math.inf if self._timeout is None else self._timeout
        jobs = (_Job("run", r, f"trial {r.number}", limit) for r in requests)
        self._start_missing()
        try:
            while self._hand_out(jobs):
                result = self._collect()
                if result is not None:
                    yield result
        finally:
            self._drop_running()

    def fill(self, wanted: Mapping[str, Sequence[Scheme]]) -> Generator[str, None, None]:
        """Names of layers as they are done; a worker has as many at a time as it has threads.

        Raises:
            TrialError: workers cannot start.
        """
        if not wanted:
            return
        jobs = (_Job("fill", share, f"layer {next(iter(share))}") for share in self._shares(wanted))
        self._start_missing()
        done: Sequence[str] = ()
        try:
            while True:
                # First of all: the caller may work for long on the layers that are done.
                is_busy = self._hand_out(jobs)
                yield from done
                if not is_busy:
                    return
                done = self._filled()
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

    def _place(self, *, may_grow: bool) -> Placement:
        try:
            return place_workers(
                alive_nodes(),
                workers=self._n_workers,
                gpus=self._gpus_per_worker,
                here=node_of_driver(),
                may_grow=may_grow,
            )
        except UsageError:
            self.close()
            raise

    def _start_missing(self) -> None:
        while len(self._idle) + len(self._waiting) < self._n_workers:
            self._start_worker()

    def _start_worker(self) -> None:
        node = self._placement.node
        actor = (
            ray.remote(Worker)
            .options(
                num_cpus=self._placement.cpus,
                num_gpus=self._gpus_per_worker,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
                if node
                else "DEFAULT",
                max_restarts=0,
                runtime_env={"env_vars": dict(environment.WORKER_VARIABLES)},
            )
            .remote(self._memory, self._threads)
        )
        self._waiting[actor.ready.remote()] = (actor, None)

    def _hand_out(self, jobs: Iterator[_Job]) -> bool:
        """Give free workers something to do; False if there is nothing left to wait for."""
        while self._idle:
            job = self._retry.popleft() if self._retry else next(jobs, None)
            if job is None:
                return any(job for _, job in self._waiting.values())
            actor = self._idle.pop()
            job = replace(job, started=time.monotonic())
            self._waiting[getattr(actor, job.call).remote(job.work)] = (actor, job)
        return True

    def _shares(
        self, wanted: Mapping[str, Sequence[Scheme]]
    ) -> Iterator[dict[str, Sequence[Scheme]]]:
        layers = iter(wanted.items())
        while share := dict(islice(layers, self._layers_at_once)):
            yield share

    def _wait(self) -> tuple[_Actor, _Job, _Ref] | None:
        """Wait for one thing to happen: a job came back, or something else did."""
        done, _ = ray.wait(list(self._waiting), num_returns=1, timeout=self._patience())
        if not done:
            return None
        actor, job = self._waiting.pop(done[0])
        if job is None:
            self._welcome(actor, done[0])
            return None
        return actor, job, done[0]

    def _filled(self) -> Sequence[str]:
        """Layers that no worker will go on with."""
        back = self._wait()
        if back is None:
            return ()
        actor, job, ref = back
        try:
            ray.get(ref)
        except RayTaskError as error:
            _log.warning("A worker failed at %s: %s", job.name, last_line(error))
        except RayError as error:
            return () if self._try_again(actor, job, error) else tuple(job.work)
        self._idle.append(actor)
        return tuple(job.work)

    def _collect(self) -> TrialResult | None:
        """A result if a trial ended for good meanwhile."""
        back = self._wait()
        if back is None:
            return self._give_up_overdue()
        actor, job, ref = back
        try:
            outcome: GuardedResult = ray.get(ref)
        except RayError as error:
            if self._try_again(actor, job, error):
                return None
            return _failed(
                job,
                TrialStatus.WORKER_DIED,
                f"Its worker died in each of {job.attempts} attempts: {last_line(error)}",
            )
        if outcome.tainted:
            self._replace_all(actor)
        else:
            self._idle.append(actor)
        return replace(outcome.result, attempts=job.attempts)

    def _patience(self) -> float | None:
        """Seconds until the next job is overdue."""
        due = min((job.overdue_at for _, job in self._waiting.values() if job), default=math.inf)
        return None if math.isinf(due) else max(0.0, due - time.monotonic())

    def _give_up_overdue(self) -> TrialResult | None:
        for ref, (actor, job) in self._waiting.items():
            if job is not None and time.monotonic() >= job.overdue_at:
                del self._waiting[ref]
                self._replace(actor)
                return _failed(
                    job,
                    TrialStatus.TIMED_OUT,
                    f"The trial ran longer than the limit of {job.limit:g} s and was stopped.",
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
                    f"one says: {last_line(error)} Next step: try --driver local, which shows "
                    "the same error with its cause."
                ) from error
            self._replace(actor)
        else:
            self._start_failures = 0
            self._idle.append(actor)

    def _try_again(self, actor: _Actor, job: _Job, error: RayError) -> bool:
        """After the death of a job's worker; False if the job was tried often enough."""
        _log.warning("The worker of %s died: %s", job.name, last_line(error))
        self._replace(actor)
        if job.attempts > self._max_retries:
            return False
        self._retry.append(replace(job, attempts=job.attempts + 1))
        return True

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


def _failed(job: _Job, status: TrialStatus, error: str) -> TrialResult:
    seconds = round(time.monotonic() - job.started, 4)
    return TrialResult(job.work, status, seconds=seconds, error=error, attempts=job.attempts)
