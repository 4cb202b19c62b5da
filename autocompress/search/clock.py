"""What a study spends of time: its own, and that of the GPUs which it holds."""

from __future__ import annotations

import time
from collections.abc import Iterable

from autocompress.core import Elapsed, TrialResult


class Clock:
    """Runs from when it is made; adds up over the runs of a study.

    Args:
        n_gpus: GPUs that are held from now on.
    """

    def __init__(self, n_gpus: float = 0.0) -> None:
        self._before, self._n_gpus = Elapsed(), n_gpus
        self._since = time.monotonic()

    @property
    def elapsed(self) -> Elapsed:
        """So far, to the millisecond, as the journal keeps it."""
        seconds = time.monotonic() - self._since
        total = self._before + Elapsed(seconds, seconds * self._n_gpus)
        return Elapsed(round(total.seconds, 3), round(total.gpu_seconds, 3))

    def hold(self, n_gpus: float) -> None:
        """From now on so many GPUs are held."""
        self._before, self._n_gpus = self.elapsed, n_gpus
        self._since = time.monotonic()

    def add(self, earlier: Elapsed) -> None:
        """Count what earlier runs have spent."""
        self._before += earlier


def spent_before(results: Iterable[TrialResult], n_workers: int, n_gpus: float) -> Elapsed:
    """What the runs that wrote a journal had spent when its last trial ended.

    What does not say so, as in older journals, is taken to have run on as many workers
    as there are now, all of them busy.

    Args:
        results: in the order of the journal.
        n_workers: trials that run at the same time.
        n_gpus: GPUs that the workers hold together.
    """
    spent = Elapsed()
    for result in results:
        seconds = result.seconds / n_workers
        spent = result.elapsed or spent + Elapsed(seconds, seconds * n_gpus)
    return spent
