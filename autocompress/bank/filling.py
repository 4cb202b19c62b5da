"""The order in which several workers build what is missing: free layers first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch

from autocompress.core import LayerSpec, Scheme

Progress = Callable[[int, int], None]
"""Called after each job with the number of jobs done and their total."""


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
    attempt: Callable[[Job, bool], bool],
    *,
    n_threads: int,
    progress: Progress | None,
) -> None:
    """Run every job; those whose lock another process holds come last.

    One lock is held at a time, so that workers that need the same layers cannot block each other.

    Args:
        jobs: to run.
        attempt: runs a job; told whether to wait for its lock; False if it did not get it.
        n_threads: jobs at the same time, each with one torch thread; 1 runs them here, with all.
        progress: told about every finished job.
    """
    finished = count(1)

    def run(job: Job, wait: bool) -> bool:
        done = attempt(job, wait)
        if done and progress is not None:
            progress(next(finished), len(jobs))
        return done

    if n_threads > 1:
        with _one_torch_thread(), ThreadPoolExecutor(n_threads) as pool:
            done = list(pool.map(lambda job: run(job, False), jobs))
    else:
        done = [run(job, False) for job in jobs]
    busy = [job for job, is_done in zip(jobs, done, strict=True) if not is_done]
    while busy:
        left = [job for job in busy if not run(job, False)]
        if len(left) == len(busy):
            run(left.pop(0), True)
        busy = left


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
