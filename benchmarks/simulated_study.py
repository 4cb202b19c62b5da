"""The time of a study without a model: workers, a driver, deaths and stragglers as discrete events.

`scale_simulation.py` and `budget_on_paper.py` say what to simulate; this file has no costs.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RUNGS = (0.25, 0.5, 1.0)
MAX_RETRIES = 2  # as the Ray driver
_READY, _DONE, _DIED = range(3)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Costs of a study, in seconds.

    Attributes:
        trial_seconds: mean of a trial that sees all tokens.
        spread: standard deviation of the logarithm of trial times (stragglers); the mean stays.
        ask_seconds: of the driver, per proposal; one driver serves one worker at a time.
        tell_seconds: of the driver, per result: tell, journal, mirror, message.
        stop_shares: of trials that stop after 1/4 and after 1/2 of the tokens.
        lifetime_seconds: mean life of a worker at work, exponential.
        restart_seconds: from a death until the worker holds the model again.
    """

    trial_seconds: float
    spread: float = 0.0
    ask_seconds: float = 0.0
    tell_seconds: float = 0.0
    stop_shares: tuple[float, float] = (0.0, 0.0)
    lifetime_seconds: float = math.inf
    restart_seconds: float = 0.0

    @property
    def mean_work_seconds(self) -> float:
        """Of a trial, early stopping counted in."""
        shares = (*self.stop_shares, 1 - sum(self.stop_shares))
        return self.trial_seconds * sum(s * r for s, r in zip(shares, RUNGS, strict=True))

    @property
    def saturating_workers(self) -> float:
        """Workers at which the driver never rests: cycle of a lone worker over driver time."""
        driver = self.ask_seconds + self.tell_seconds
        return 1 + self.mean_work_seconds / driver if driver else math.inf

    def draw_work(self, n_trials: int, seed: int) -> NDArray[np.float64]:
        """Seconds of each trial: the same ones for any number of workers."""
        random = np.random.default_rng([seed, 1])
        shares = (*self.stop_shares, 1 - sum(self.stop_shares))
        rungs = random.choice(RUNGS, size=n_trials, p=shares)
        stragglers = random.lognormal(-(self.spread**2) / 2, self.spread, n_trials)
        return np.asarray(self.trial_seconds * rungs * stragglers, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a study. Worker seconds: busy + lost + restarting + idle = workers x makespan.

    Attributes:
        workers: that ran at the same time.
        trials: that ended, `failed` ones (dead in every attempt) included.
        failed: trials given up.
        deaths: of workers.
        makespan: seconds until the last result was told.
        busy: worker seconds of attempts that ended.
        lost: worker seconds of attempts that died.
        restarting: worker seconds until the model was back.
        idle: worker seconds of waiting for the driver, a barrier or the end.
        driver_busy: seconds of the driver.
    """

    workers: int
    trials: int
    failed: int
    deaths: int
    makespan: float
    busy: float
    lost: float
    restarting: float
    idle: float
    driver_busy: float

    @property
    def trials_per_second(self) -> float:
        """Ended trials over the makespan."""
        return self.trials / self.makespan


class Simulation:
    """One study. The driver serves results in the order of arrival and hands out the next trial.

    Args:
        scenario: what things cost.
        n_workers: ready at time 0.
        n_trials: of the study.
        generation: trials that must all be told before the next proposals; 0 for none
            (asynchronous).
        seed: of trial times and deaths.
    """

    def __init__(
        self,
        scenario: Scenario,
        n_workers: int,
        n_trials: int,
        *,
        generation: int = 0,
        seed: int = 0,
    ) -> None:
        self._scenario, self._n_trials, self._generation = scenario, n_trials, generation
        self._work = scenario.draw_work(n_trials, seed)
        self._deaths_random = np.random.default_rng([seed, 2])
        self._events = [(0.0, w, w, _READY) for w in range(n_workers)]
        self._n_events = n_workers
        self._since = [0.0] * n_workers  # when the worker's last known state ended
        self._running = [-1] * n_workers
        self._attempts = [1] * n_trials
        self._retries: deque[int] = deque()
        self._resting: list[int] = []
        self._asked = self._told = self._failed = self._deaths = 0
        self._driver_free = self._driver_busy = self._makespan = 0.0
        self._busy = self._lost = self._restarting = self._idle = 0.0

    def run(self) -> Outcome:
        """Until the last trial is told."""
        while self._told < self._n_trials:
            time, _, worker, kind = heapq.heappop(self._events)
            if kind == _DIED:
                self._bury(time, worker)
            else:
                self._serve(time, worker, tells=kind == _DONE)
        for since in self._since:  # a restart may outlast the study
            self._idle += max(0.0, self._makespan - since)
            self._restarting -= max(0.0, since - self._makespan)
        return Outcome(
            workers=len(self._since),
            trials=self._n_trials,
            failed=self._failed,
            deaths=self._deaths,
            makespan=self._makespan,
            busy=self._busy,
            lost=self._lost,
            restarting=self._restarting,
            idle=self._idle,
            driver_busy=self._driver_busy,
        )

    def _serve(self, time: float, worker: int, *, tells: bool) -> None:
        began = now = max(time, self._driver_free)
        if tells:
            now += self._scenario.tell_seconds
            self._count_told(now)
        is_new = not self._retries
        trial = self._next_trial()
        if trial is not None and is_new:
            now += self._scenario.ask_seconds
        self._driver_free = now
        self._driver_busy += now - began
        if trial is None:
            self._resting.append(worker)
        else:
            self._begin(now, worker, trial)

    def _next_trial(self) -> int | None:
        if self._retries:
            return self._retries.popleft()
        limit = self._n_trials
        if self._generation:
            limit = min(limit, (self._told // self._generation + 1) * self._generation)
        if self._asked >= limit:
            return None
        self._asked += 1
        return self._asked - 1

    def _begin(self, now: float, worker: int, trial: int) -> None:
        self._idle += now - self._since[worker]
        self._running[worker] = trial
        seconds, kind = float(self._work[trial]), _DONE
        if math.isfinite(self._scenario.lifetime_seconds):
            life = float(self._deaths_random.exponential(self._scenario.lifetime_seconds))
            seconds, kind = (life, _DIED) if life < seconds else (seconds, kind)
        if kind == _DONE:
            self._busy += seconds
        else:
            self._lost += seconds
        self._since[worker] = now + seconds
        self._push(now + seconds, worker, kind)

    def _bury(self, time: float, worker: int) -> None:
        """The trial is tried again by whoever is free; the worker restarts."""
        trial = self._running[worker]
        self._deaths += 1
        self._attempts[trial] += 1
        if self._attempts[trial] > 1 + MAX_RETRIES:
            self._failed += 1
            self._count_told(time)
        else:
            self._retries.append(trial)
            if self._resting:
                self._push(time, self._resting.pop(), _READY)
        self._restarting += self._scenario.restart_seconds
        self._since[worker] = time + self._scenario.restart_seconds
        self._push(self._since[worker], worker, _READY)

    def _count_told(self, time: float) -> None:
        self._told += 1
        self._makespan = max(self._makespan, time)
        if self._generation and self._told % self._generation == 0:
            for worker in self._resting:
                self._push(time, worker, _READY)
            self._resting = []

    def _push(self, time: float, worker: int, kind: int) -> None:
        self._n_events += 1
        heapq.heappush(self._events, (time, self._n_events, worker, kind))
