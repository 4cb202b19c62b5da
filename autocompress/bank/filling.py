"""The order in which several workers build what is missing: free layers first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch

from autocompress.core import LayerSpec, Scheme

Progress = Callable[[int, int], None]
"""Called after each job with the number of jobs done and their total."""

Stopped = Callable[[], bool]
"""Says whether a job should end early, after the scheme that it is at."""

WORKING_BYTES = 2 << 30
"""Memory for what is decomposed and compressed at the same time."""


@dataclass(frozen=True, slots=True)
class Job:
    """Entries of one layer that share its decompositions, built by one thread under one lock.

    Attributes:
        layer: what is compressed.
        schemes: canonical, in the order in which they are built.
        lock: equal for jobs of equal weight and statistics, in every process.
    """

    layer: LayerSpec
    schemes: tuple[Scheme, ...]
    lock: str


def run_jobs(
    jobs: Sequence[Job],
    attempt: Callable[[Job, bool, Stopped], bool],
    *,
    n_threads: int,
    progress: Progress | None,
) -> None:
    """Run every job; those whose lock another process holds come last.

    One lock is held at a time, so that workers that need the same layers cannot block each other.
    An error, or an interrupt, ends jobs of other threads early.

    Args:
        jobs: to run.
        attempt: runs a job; told whether to wait for its lock; False if it did not get it.
        n_threads: jobs at the same time, each with one torch thread; 1 runs them here, with all.
        progress: told about every finished job.
    """
    finished = count(1)

    def run(job: Job, wait: bool = False, stopped: Stopped = _never) -> bool:
        done = attempt(job, wait, stopped)
        if done and progress is not None:
            progress(next(finished), len(jobs))
        return done

    if n_threads > 1:
        over = threading.Event()
        with one_torch_thread(), ThreadPoolExecutor(n_threads) as pool:
            try:
                done = list(pool.map(lambda job: run(job, stopped=over.is_set), jobs))
            finally:
                over.set()
    else:
        done = list(map(run, jobs))
    busy = [job for job, is_done in zip(jobs, done, strict=True) if not is_done]
    while busy:
        left = [job for job in busy if not run(job)]
        if len(left) == len(busy):
            run(left.pop(0), wait=True)
        busy = left


def _never() -> bool:
    return False


def shares(layers: Iterable[LayerSpec], n_threads: int) -> Iterator[list[LayerSpec]]:
    """Runs of layers that memory holds at the same time, `n_threads` at most; a large one alone."""
    share: list[LayerSpec] = []
    for layer in layers:
        n_bytes = sum(map(_working_bytes, [*share, layer]))
        if share and (len(share) == n_threads or n_bytes > WORKING_BYTES or is_large(layer)):
            yield share
            share = []
        share.append(layer)
        if is_large(layer):
            yield share
            share = []
    if share:
        yield share


def is_large(layer: LayerSpec) -> bool:
    """Whether memory may not hold two such layers; it is then compressed alone, by all threads."""
    return 2 * _working_bytes(layer) > WORKING_BYTES


def _working_bytes(layer: LayerSpec) -> int:
    """Second moments and their factors, spectra and a few copies of the weight, roughly."""
    o, d = layer.out_features, layer.in_features
    return 16 * (d * d + o * min(o, d) + o * d)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Within the block this thread, and those that it starts, compute with one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
