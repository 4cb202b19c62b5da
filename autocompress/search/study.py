"""A study: baselines first, then ask, measure, tell, until the budget is spent.

All else is relative to the base, so its trial is tried again at once, though only once, where
memory, time or its worker failed it. A study that goes on tries all such baselines again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from autocompress.core import BASE_ALLOCATION, Allocation, Bar, TrialRequest, TrialResult
from autocompress.core.errors import BudgetError, RunDirectoryError, TrialError
from autocompress.fronts import Front
from autocompress.search.budget import Budget, Spent
from autocompress.search.clock import Clock, spent_before
from autocompress.search.driver import Driver
from autocompress.search.interrupts import interrupt_deferred
from autocompress.search.journal import Journal
from autocompress.search.known import KnownResults
from autocompress.search.mirror import Mirror
from autocompress.search.racing import DEFAULT_RACING, Costs, Racing, Rivals
from autocompress.search.reserve import Reserve
from autocompress.search.sampler import Sampler
from autocompress.spaces import SearchSpace

_log = logging.getLogger(__name__)

GIVE_UP_AFTER = 20
"""A study whose first trials fail this many times without a single success ends early."""
_AFTER_FAILURE = (
    "mend the cause, then search into another --out directory: --resume keeps failed trials."
)
_AFTER_TRANSIENT = (
    "give trials more memory or time (--trial-timeout), then repeat the command with --resume, "
    "which tries base and baselines again."
)
_BASE_NUMBER = 0
_BASE_TRIES = 2


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a study stands after a trial.

    Attributes:
        n_done: finished trials, earlier runs included.
        n_early_stopped: those of them that were stopped early.
        n_failed: those of them that something went wrong with.
        fraction: share of the scarcest budget that is spent or reserved, 0 to 1.
        remaining: what is left of each budget, for people.
        best: the measured trials that no other trial beats on damage and all
            resources, by damage.
        last: the trial that just finished.
    """

    n_done: int
    n_early_stopped: int
    n_failed: int
    fraction: float
    remaining: str
    best: tuple[TrialResult, ...]
    last: TrialResult


def baselines(space: SearchSpace) -> tuple[tuple[str, Allocation], ...]:
    """The base model, then the uniform allocations: what every study measures first."""
    return (("base", BASE_ALLOCATION), *space.baselines())


class Study:
    """One search. The journal is its whole state: a study that starts on a journal goes on.

    Args:
        space: what may be chosen.
        sampler: fresh; it is told the journal's trials; says what the objectives are.
        driver: where trials run.
        journal: open for writing.
        budget: for the journal's trials and the new ones together. Its limits of time do not hold
            up base and baselines, without which a front says little.
        racing: gives each proposal a rival of no more cost, which may end it early where the
            driver's context has rungs (`TrialContext.with_racing`); None runs all to the end.
        mirror: told each finished trial.
        progress: called after each finished trial, in this process.
        proposed: named allocations of the space that are measured after the uniform ones, whoever
            samples; the same ones whenever the study goes on.
        clock: has counted what this run spent before its first trial; a new one by default.
        reserve: time of the budget that is left for what follows; none by default.

    Raises:
        BudgetError: the budget is in GPU-hours and the driver holds no GPU.
        RunDirectoryError: the journal belongs to another study.
    """

    def __init__(
        self,
        space: SearchSpace,
        sampler: Sampler,
        driver: Driver,
        journal: Journal,
        budget: Budget,
        *,
        racing: Racing | None = DEFAULT_RACING,
        mirror: Mirror | None = None,
        progress: Callable[[Progress], None] | None = None,
        proposed: Sequence[tuple[str, Allocation]] = (),
        clock: Clock | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        if budget.gpu_seconds is not None and not driver.n_gpus:
            raise BudgetError(
                "A budget in GPU-hours needs workers that hold GPUs, but these hold none. Next "
                "step: give a budget in trials, minutes or tokens, or --gpus-per-worker."
            )
        self.interrupted = False
        self._space, self._sampler, self._driver = space, sampler, driver
        self._journal, self._budget = journal, budget
        self._mirror, self._progress = mirror, progress
        self._baselines = (*baselines(space), *proposed)
        self._done: dict[int, TrialResult] = {}
        self._known = KnownResults()
        self._running: dict[int, TrialRequest] = {}
        self._again: list[int] = []
        self._base_tries = _BASE_TRIES
        self._tried: set[Allocation] = set()
        self._costs: dict[Allocation, Costs | None] = {}
        self._front: Front[TrialResult] = Front()
        self._rivals = Rivals() if racing is not None else None
        self._n_early_stopped = self._n_failed = 0
        self._reserve = reserve
        self._clock = clock or Clock()
        self._clock.hold(driver.n_gpus)
        self._replay(journal.read())

    @property
    def spent(self) -> Spent:
        """What is used up so far, earlier runs included; running trials count as trials."""
        elapsed = self._clock.elapsed
        finished = [r.n_tokens for r in self._done.values()]
        return Spent(
            trials=len(self._done) + len(self._running),
            seconds=elapsed.seconds,
            tokens=sum(finished),
            gpu_seconds=elapsed.gpu_seconds,
        )

    def run(self) -> list[TrialResult]:
        """All finished trials, in the order in which they finished.

        An interrupt (Ctrl-C) drops the trials that are running, sets `interrupted` and returns
        what is finished.

        Raises:
            TrialError: every trial failed; names the first error.
            RunDirectoryError: the journal cannot be written.
        """
        try:
            with closing(self._driver.run(self._requests())) as results:
                for result in results:
                    self._finish(result)
                    self._require_some_success(after=GIVE_UP_AFTER)
        except KeyboardInterrupt:
            self.interrupted = True
            self._running.clear()
            _log.info("Interrupted; finished trials are kept.")
        self._require_some_success(after=1)
        return self._journal.read()

    def _replay(self, results: list[TrialResult]) -> None:
        for result in sorted(results, key=lambda r: r.request.number):
            self._check_belongs(result)
            if not (result.request.is_baseline and result.is_transient):
                self._learn(result)
        driver = self._driver
        self._clock.add(spent_before(results, driver.n_workers, driver.n_gpus))
        self._front = self._front_with(results)

    def _check_belongs(self, result: TrialResult) -> None:
        request = result.request
        expected = self._baseline(request.number)
        if request != expected and (expected or self._costs_of(request.allocation) is None):
            other = f"that of {expected.source}" if expected else f"one of {self._space.name!r}"
            raise RunDirectoryError(
                f"The journal {self._journal.path} belongs to another study: its trial "
                f"{request.number} ({request.source}) is not {other} here. Next step: resume with "
                "the same model and space, or give another --out directory."
            )

    def _requests(self) -> Iterator[TrialRequest]:
        """What to run next, decided when a worker is free."""
        for number in self._numbers():
            is_baseline = number < len(self._baselines)
            budget = self._budget.untimed if is_baseline else self._budget
            if budget.exhausted(self._committed()):
                return
            request = self._baseline(number) or self._proposal(number)
            if request is None:
                return
            repeated = self._known.repeated(request)
            if repeated is not None:
                self._finish(repeated)
                continue
            self._running[number] = request
            self._note_tried(request.allocation)
            yield request

    def _numbers(self) -> Iterator[int]:
        """Of the trials that are not done, in order; what is tried again comes first."""
        for number in itertools.count():
            while self._again:
                yield self._again.pop()
            if number not in self._done:
                yield number

    def _committed(self) -> Spent:
        """Spent or reserved; running trials are taken to need as many tokens as the largest one."""
        spent = self._spent_or_reserved()
        typical = max((r.n_tokens for r in self._done.values()), default=0)
        return replace(spent, tokens=spent.tokens + typical * len(self._running))

    def _spent_or_reserved(self) -> Spent:
        spent = self.spent
        if self._reserve is None:
            return spent
        n_members = sum(not r.request.is_baseline for r in self._front.members)
        seconds = self._reserve.seconds(len(self._baselines), n_members)
        return replace(
            spent,
            seconds=spent.seconds + seconds,
            gpu_seconds=spent.gpu_seconds + seconds * self._driver.n_gpus,
        )

    def _baseline(self, number: int) -> TrialRequest | None:
        if number >= len(self._baselines):
            return None
        name, allocation = self._baselines[number]
        return TrialRequest(number, allocation, f"baseline:{name}")

    def _proposal(self, number: int) -> TrialRequest | None:
        """The sampler's next allocation; None if the space holds no further one."""
        if len(self._tried) >= self._space.n_combinations:
            return None
        allocation = self._sampler.ask(number)
        return TrialRequest(
            number, allocation, f"sampler:{self._sampler.name}", self._bar(allocation)
        )

    def _bar(self, allocation: Allocation) -> Bar | None:
        if self._rivals is None:
            return None
        costs = self._costs_of(allocation)
        return None if costs is None else self._rivals.bar(costs)

    def _finish(self, result: TrialResult) -> None:
        """Journal first, so that what is told is never lost; all of it or nothing."""
        number = result.request.number
        with interrupt_deferred():
            state = dict(self._sampler.state(number))
            result = replace(result, sampler_state=state, elapsed=self._clock.elapsed)
            self._journal.append(result)
            self._running.pop(number, None)
            if self._is_tried_again(result):
                self._again.append(number)
                return
            self._learn(result)
            self._front = self._front_with([result])
            if self._mirror is not None:
                self._mirror.add(result)
        self._show(result)

    def _is_tried_again(self, result: TrialResult) -> bool:
        if result.request.number != _BASE_NUMBER or not result.is_transient:
            return False
        self._base_tries -= 1
        return self._base_tries > 0

    def _show(self, result: TrialResult) -> None:
        if self._progress is None:
            return
        spent = self._spent_or_reserved()
        self._progress(
            Progress(
                n_done=len(self._done),
                n_early_stopped=self._n_early_stopped,
                n_failed=self._n_failed,
                fraction=self._budget.fraction(spent),
                remaining=self._budget.remaining(spent),
                best=self._front.members,
                last=result,
            )
        )

    def _learn(self, result: TrialResult) -> None:
        self._done[result.request.number] = result
        self._known.learn(result)
        self._note_tried(result.request.allocation)
        self._n_early_stopped += result.is_early_stopped
        self._n_failed += result.has_failed
        self._enter_race(result)
        self._sampler.tell(result)

    def _enter_race(self, result: TrialResult) -> None:
        if self._rivals is None or not result.is_complete:
            return
        costs = self._costs_of(result.request.allocation)
        if costs is not None:
            self._rivals.add(costs, result)

    def _note_tried(self, allocation: Allocation) -> None:
        if self._costs_of(allocation) is not None:
            self._tried.add(allocation)

    def _costs_of(self, allocation: Allocation) -> Costs | None:
        """`Sampler.costs_of`, encoding an allocation only once."""
        if allocation not in self._costs:
            self._costs[allocation] = self._sampler.costs_of(allocation)
        return self._costs[allocation]

    def _front_with(self, results: list[TrialResult]) -> Front[TrialResult]:
        complete = [r for r in results if r.is_complete]
        return (
            Front.of([*self._front.members, *complete], self._losses) if complete else self._front
        )

    def _losses(self, result: TrialResult) -> tuple[float, ...]:
        assert result.metrics is not None
        return self._sampler.objectives.losses(result.metrics)

    def _require_some_success(self, after: int) -> None:
        failed = len(self._done)
        if failed < after or not all(r.has_failed for r in self._done.values()):
            return
        first = min(self._done.values(), key=lambda r: r.request.number)
        raise TrialError(
            f"All of the {failed} trials failed. The first one, {first.request.source}, says: "
            f"{first.error} ({first.status}). All errors are in {self._journal.path}. Next step: "
            f"{_AFTER_TRANSIENT if first.is_transient else _AFTER_FAILURE}"
        )
