import json
import os
import signal
import time
from contextlib import closing
from dataclasses import replace

import pytest

from autocompress.core import BASE_ALLOCATION, Allocation, Scheme, TrialResult, TrialStatus
from autocompress.core.errors import BudgetError, RunDirectoryError, TrialError
from autocompress.drivers.local import LocalDriver
from autocompress.search import clock
from autocompress.search.budget import Budget
from autocompress.search.journal import Journal, read_journal
from autocompress.search.samplers import SAMPLERS
from autocompress.search.study import GIVE_UP_AFTER, Study, baselines
from autocompress.spaces.space import Choice, Option, SearchSpace
from autocompress.testing.driver_contract import LAYERS, scripted_context, scripted_space

SPACE = scripted_space()
N_BASELINES = len(baselines(SPACE))


def search(directory, *, budget="30 trials", sampler="random", space=SPACE, driver=None, **more):
    context = scripted_context(directory / "bank")
    driver = driver or LocalDriver(context)
    with Journal(directory / "trials.jsonl") as journal, closing(driver):
        sampler = SAMPLERS[sampler](space, seed=4)
        study = Study(space, sampler, driver, journal, Budget.parse(budget), **more)
        return study.run(), study


def archive(results):
    """What must not depend on how a study was run: seconds do."""
    lines = [r.to_json() | {"seconds": 0, "elapsed": None} for r in results]
    return sorted(lines, key=lambda line: line["number"])


def space_of(scheme_texts):
    options = tuple(Option(t, (Scheme.parse(t),)) for t in scheme_texts)
    return SearchSpace("s", "scripted", tuple(Choice(n, (n,), options) for n in LAYERS))


def test_the_base_and_the_uniform_allocations_come_first(tmp_path):
    results, _ = search(tmp_path)
    assert [r.request.number for r in results] == list(range(30))
    assert [r.request.baseline_name for r in results[:N_BASELINES]] == [
        "base", *(f"uniform-{b}bit" for b in (8, 6, 5, 4, 3, 2)),
    ]  # fmt: skip
    assert results[0].request.allocation == BASE_ALLOCATION
    assert {r.request.source for r in results[N_BASELINES:]} == {"sampler:random"}
    assert all(r.is_complete for r in results)


def test_what_is_returned_is_what_the_journal_holds(tmp_path):
    results, _ = search(tmp_path)
    assert results == list(read_journal(tmp_path / "trials.jsonl").results)


class Killed(BaseException):
    """Stands for a kill: nothing of the study may run after it."""


class KilledDriver(LocalDriver):
    def __init__(self, context, after):
        super().__init__(context)
        self._after = after

    def run(self, requests):
        for count, result in enumerate(super().run(requests)):
            if count == self._after:
                raise Killed
            yield result


@pytest.mark.parametrize("killed_after", [2, 11, 24])
@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, sampler, killed_after):
    whole, _ = search(tmp_path / "whole", sampler=sampler, budget="45 trials")
    parts = tmp_path / "parts"
    with pytest.raises(Killed):
        search(
            parts,
            sampler=sampler,
            budget="45 trials",
            driver=KilledDriver(scripted_context(parts / "bank"), killed_after),
        )
    with (parts / "trials.jsonl").open("ab") as file:
        file.write(b'{"number": 99, "torn')
    resumed, _ = search(parts, sampler=sampler, budget="45 trials")
    assert archive(resumed) == archive(whole)


def test_a_study_that_is_finished_runs_nothing_more(tmp_path):
    first, _ = search(tmp_path)
    again, study = search(tmp_path)
    assert again == first
    assert study.spent.trials == 30


def test_a_larger_budget_continues_a_finished_study(tmp_path):
    search(tmp_path / "a", budget="20 trials")
    continued, _ = search(tmp_path / "a", budget="30 trials")
    whole, _ = search(tmp_path / "b", budget="30 trials")
    assert archive(continued) == archive(whole)


def test_a_gap_that_a_dead_process_left_is_filled(tmp_path):
    whole, _ = search(tmp_path)
    path = tmp_path / "trials.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:15] + lines[16:]))
    assert archive(search(tmp_path)[0]) == archive(whole)


def test_the_journal_of_another_study_is_refused(tmp_path):
    search(tmp_path)
    with pytest.raises(RunDirectoryError, match="belongs to another study"):
        search(tmp_path, space=scripted_space(bits=(3, 7)))


def test_a_cold_bank_equals_a_warm_one(tmp_path):
    cold, _ = search(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "bank").rename(tmp_path / "b" / "bank")
    warm, _ = search(tmp_path / "b")
    assert archive(warm) == archive(cold)


def test_a_budget_of_tokens_or_time_ends_the_study(tmp_path):
    results, study = search(tmp_path / "tokens", budget="100 tokens")
    assert study.spent.tokens == sum(r.n_tokens for r in results) == 112  # 16 a trial
    results, _ = search(tmp_path / "time", budget="0.05s")
    assert len(results) >= N_BASELINES


class Ticking(LocalDriver):
    """Each trial takes ten seconds of the given time."""

    n_gpus = 2.0

    def __init__(self, context, time):
        super().__init__(context)
        self._time = time

    def run(self, requests):
        for result in super().run(requests):
            self._time.now += 10
            yield replace(result, seconds=10.0)


def timed_search(directory, time, **more):
    """After 100 seconds of preparation on one GPU."""
    started = clock.Clock(1.0)
    time.now += 100
    driver = Ticking(scripted_context(directory / "bank"), time)
    return search(directory, driver=driver, clock=started, **more)


def test_a_budget_of_time_counts_what_precedes_the_trials(tmp_path, ticking):
    results, study = timed_search(tmp_path / "a", ticking, budget="300s")
    assert len(results) == 20
    assert (study.spent.seconds, study.spent.gpu_seconds) == (300.0, 100.0 + 2 * 200.0)
    hours = 500 / 3600
    assert len(timed_search(tmp_path / "b", ticking, budget=f"{hours} gpu-hours")[0]) == 20


def test_time_is_left_for_measuring_the_front_again(tmp_path, ticking):
    class Fifty:
        def seconds(self, n_baselines, n_members):
            assert n_baselines == N_BASELINES
            seen.append(n_members)
            return 50.0

    seen, shown = [], []
    results, study = timed_search(
        tmp_path / "a",
        ticking,
        budget="300s",
        sampler="nsga2",
        reserve=Fifty(),
        progress=shown.append,
    )
    assert (len(results), study.spent.seconds) == (15, 250.0)
    assert (shown[-1].fraction, shown[-1].remaining) == (1.0, "0s")
    on_front = sum(not r.request.is_baseline for r in shown[-1].best)
    assert seen[-1] == on_front > 0
    budget = f"{500 / 3600} gpu-hours"  # of which two GPUs for 50 seconds are left
    assert len(timed_search(tmp_path / "b", ticking, budget=budget, reserve=Fifty())[0]) == 15


def test_base_and_baselines_are_measured_though_the_time_is_spent(tmp_path, ticking):
    results, _ = timed_search(tmp_path, ticking, budget="60s")
    assert [r.request.number for r in results] == list(range(N_BASELINES))
    assert len(search(tmp_path, budget="60s")[0]) == N_BASELINES


def test_baselines_do_not_outrun_a_budget_of_trials(tmp_path, ticking):
    assert len(timed_search(tmp_path, ticking, budget=["60s", "3 trials"])[0]) == 3


def test_a_budget_in_gpu_hours_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(BudgetError, match="--gpus-per-worker"):
        search(tmp_path, budget="1 gpu-hours")


def test_a_space_that_is_used_up_ends_the_study(tmp_path):
    space = space_of(["rtn(bits=2)", "rtn(bits=4)"])
    results, _ = search(tmp_path, space=space, budget="1h")
    allocations = {r.request.allocation for r in results}
    assert len(allocations) == 2**3 + 1  # the base is outside
    repeats = [r for r in results if r.notes and r.notes[0].startswith("same allocation as trial")]
    assert all(r.n_tokens == 0 and r.is_complete for r in repeats)


def test_failed_trials_are_in_the_journal_with_their_error(tmp_path):
    space, seen = space_of(["rtn(bits=4)", "fail"]), []
    results, _ = search(tmp_path, space=space, budget="6 trials", progress=seen.append)
    failed = [r for r in results if r.status is TrialStatus.FAILED]
    assert failed
    assert seen[-1].n_failed == len(failed)
    assert search(tmp_path, space=space, budget="7 trials", progress=seen.append)
    assert seen[-1].n_failed - len(failed) == seen[-1].last.has_failed  # a resume counts them too
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert {line["error"] for line in lines if line["status"] == "failed"} == {
        "ValueError: scripted failure"
    }


class BrokenDriver(LocalDriver):
    """Every trial fails, the base model's too."""

    def run(self, requests):
        for request in requests:
            yield TrialResult(request, TrialStatus.FAILED, error=f"no luck with {request.number}")


def test_a_study_whose_trials_all_fail_says_so_with_the_first_error(tmp_path):
    driver = BrokenDriver(scripted_context(tmp_path))
    with pytest.raises(TrialError, match=r"All of the 5 trials failed.*no luck with 0") as caught:
        search(tmp_path, driver=driver, budget="5 trials")
    assert "search into another --out directory: --resume keeps failed" in str(caught.value)
    assert caught.value.exit_status == 1
    assert len(read_journal(tmp_path / "trials.jsonl").results) == 5


def test_a_study_whose_trials_all_ran_out_of_memory_is_worth_a_resume(tmp_path):
    statuses = {f"n{number}": [FULL] * 2 for number in range(5)}
    driver = FailingDriver(scripted_context(tmp_path / "bank"), **statuses)
    with pytest.raises(TrialError, match=r"All of the 5 .*more memory.*command with --resume"):
        search(tmp_path, driver=driver, budget="5 trials")
    results, _ = search(tmp_path, budget="5 trials")
    assert all(r.is_complete for r in results)


def test_a_hopeless_study_does_not_use_up_its_budget(tmp_path):
    driver = BrokenDriver(scripted_context(tmp_path))
    with pytest.raises(TrialError, match=f"All of the {GIVE_UP_AFTER} trials"):
        search(tmp_path, driver=driver, budget="1000 trials")


class FailingDriver(LocalDriver):
    """The first tries of some numbers end with another status."""

    def __init__(self, context, **statuses):
        super().__init__(context)
        self._statuses = {int(name[1:]): list(each) for name, each in statuses.items()}
        self.asked = []

    def run(self, requests):
        for result in super().run(requests):
            number = result.request.number
            self.asked.append(number)
            left = self._statuses.get(number)
            if left:
                yield TrialResult(result.request, left.pop(0), error="no luck")
            else:
                yield result


DIED, FULL, LATE = TrialStatus.WORKER_DIED, TrialStatus.OUT_OF_MEMORY, TrialStatus.TIMED_OUT


@pytest.mark.parametrize("status", [DIED, FULL, LATE])
def test_a_base_that_failed_in_passing_is_tried_again_before_anything_else(tmp_path, status):
    driver = FailingDriver(scripted_context(tmp_path / "bank"), n0=[status])
    seen = []
    results, _ = search(tmp_path, driver=driver, progress=seen.append)
    assert driver.asked == [0, *range(30)]
    assert [p.n_done for p in seen] == list(range(1, 31))
    whole, _ = search(tmp_path / "whole")
    assert archive(results) == archive(whole)
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines[:3]] == [status.value, "complete", "complete"]
    assert archive(search(tmp_path)[0]) == archive(whole)


@pytest.mark.parametrize(("tries", "asked"), [([DIED, FULL], 2), ([TrialStatus.FAILED], 1)])
def test_a_base_that_fails_again_or_for_good_holds_nothing_up(tmp_path, tries, asked):
    driver = FailingDriver(scripted_context(tmp_path / "bank"), n0=tries)
    results, _ = search(tmp_path, driver=driver)
    assert driver.asked == [*[0] * asked, *range(1, 30)]
    base = next(r for r in results if r.request.number == 0)
    assert base.status is tries[-1]


def test_a_resume_tries_again_what_failed_in_passing_of_base_and_baselines(tmp_path):
    context = scripted_context(tmp_path / "bank")
    failing = {"n0": [DIED, DIED], "n2": [FULL], "n3": [TrialStatus.FAILED], "n9": [DIED]}
    first, _ = search(tmp_path, driver=FailingDriver(context, **failing))
    assert len(first) == 30
    again = FailingDriver(context)
    results, study = search(tmp_path, driver=again)
    assert again.asked == [0, 2]  # trial 9 is the sampler's, trial 3 fails each time
    assert [r.request.number for r in results if r.has_failed] == [3, 9]
    assert study.spent.trials == len(results) == 30
    last = FailingDriver(context)
    assert search(tmp_path, driver=last)[0] == results
    assert last.asked == []


class InterruptedDriver(LocalDriver):
    closed = False

    def run(self, requests):
        try:
            for count, result in enumerate(super().run(requests)):
                if count == 9:
                    raise KeyboardInterrupt
                yield result
        finally:
            self.closed = True


def test_an_interrupt_returns_what_is_finished(tmp_path):
    driver = InterruptedDriver(scripted_context(tmp_path / "bank"))
    results, study = search(tmp_path, driver=driver)
    assert len(results) == 9
    assert study.interrupted
    assert driver.closed
    whole, _ = search(tmp_path / "whole")
    assert archive(search(tmp_path)[0]) == archive(whole)


def test_progress_is_told_after_each_trial(tmp_path):
    seen = []
    _, study = search(tmp_path, budget=["10 trials", "1h"], progress=seen.append)
    assert [p.n_done for p in seen] == list(range(1, 11))
    assert [round(p.fraction, 2) for p in seen] == [round(i / 10, 2) for i in range(1, 11)]
    assert seen[-2].remaining.startswith("1 trial, ")
    best = seen[-1].best
    assert best[0].request.allocation == BASE_ALLOCATION
    sizes = [r.metrics.storage_bytes for r in best]
    assert sizes == sorted(sizes, reverse=True)
    assert not study.interrupted


def journaled_without_elapsed(directory):
    """As older versions did; 100 seconds a trial."""
    path = directory / "trials.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["elapsed"]
        line["seconds"] = 100.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class TwoWorkers(LocalDriver):
    """Says that it runs two trials at a time, on a GPU each."""

    n_workers = 2
    n_gpus = 2.0


def test_what_an_earlier_run_spent_counts(tmp_path):
    search(tmp_path, budget="8 trials")
    journaled_without_elapsed(tmp_path)
    started = time.monotonic()
    results, study = search(tmp_path, budget=["50 trials", "10m"])
    assert len(results) == 8
    assert study.spent.seconds == pytest.approx(800 + time.monotonic() - started, abs=5)


def test_a_journal_that_does_not_say_what_was_spent_is_estimated_on_a_resume(tmp_path):
    search(tmp_path, budget="8 trials")
    journaled_without_elapsed(tmp_path)
    driver = TwoWorkers(scripted_context(tmp_path / "bank"))
    _, study = search(tmp_path, budget="8 trials", driver=driver)
    assert study.spent.seconds == pytest.approx(400, abs=5)
    assert study.spent.gpu_seconds == pytest.approx(800, abs=10)


def test_what_was_spent_does_not_depend_on_the_workers_of_a_resume(tmp_path):
    class Slow(TwoWorkers):
        def run(self, requests):
            for result in super().run(requests):
                yield replace(result, seconds=100.0)

    context = scripted_context(tmp_path / "bank")
    search(tmp_path, budget="8 trials", driver=Slow(context))
    spent = read_journal(tmp_path / "trials.jsonl").results[-1].elapsed
    assert 0 < spent.seconds < 100
    assert spent.gpu_seconds == pytest.approx(2 * spent.seconds, abs=0.01)
    results, again = search(tmp_path, budget=["9 trials", "10m"])
    assert len(results) == 9
    assert spent.seconds <= again.spent.seconds < 100
    assert again.spent.gpu_seconds == pytest.approx(spent.gpu_seconds)
    recorded = [r.elapsed.seconds for r in results]
    assert recorded == sorted(recorded)


def test_an_allocation_that_comes_again_is_not_measured_again(tmp_path):
    class Stubborn(SAMPLERS["random"]):
        name = "stubborn"

        def ask(self, number):
            return Allocation.of({"first": Scheme.parse("rtn(bits=8,group_size=16)")})

    measured = []

    class Counting(LocalDriver):
        def run(self, requests):
            for result in super().run(requests):
                measured.append(result.request.number)
                yield result

    with Journal(tmp_path / "trials.jsonl") as journal:
        sampler = Stubborn(SPACE, seed=0)
        driver = Counting(scripted_context(tmp_path / "bank"))
        results = Study(SPACE, sampler, driver, journal, Budget(trials=12)).run()
    assert measured == list(range(N_BASELINES + 1))
    assert len(results) == 12
    assert {r.metrics.storage_bytes for r in results[N_BASELINES:]} == {
        results[N_BASELINES].metrics.storage_bytes
    }
    assert results[-1].notes == (f"same allocation as trial {N_BASELINES}",)


def test_an_interrupt_while_a_trial_is_journaled_loses_nothing(tmp_path, monkeypatch):
    append = Journal.append

    def interrupted(self, result):
        append(self, result)
        if result.request.number == 9:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Journal, "append", interrupted)
    results, study = search(tmp_path)
    assert study.interrupted
    assert results == list(read_journal(tmp_path / "trials.jsonl").results)
    assert len(results) == study.spent.trials == 10


def test_proposed_allocations_come_after_the_uniform_ones_and_again_on_a_resume(tmp_path):
    levels = {choice.name: n % 2 for n, choice in enumerate(SPACE.choices)}
    proposed = [("mixed", SPACE.decode(levels))]
    results, _ = search(tmp_path / "whole", budget="12 trials", proposed=proposed)
    names = [r.request.baseline_name for r in results]
    assert names[N_BASELINES] == "mixed"
    assert results[N_BASELINES].request.allocation == proposed[0][1]
    assert names[N_BASELINES + 1] is None or not names[N_BASELINES + 1]
    search(tmp_path / "parts", budget=f"{N_BASELINES} trials", proposed=proposed)
    again, _ = search(tmp_path / "parts", budget="12 trials", proposed=proposed)
    assert archive(again) == archive(results)
    other = r"another study: its trial 7 \(baseline:mixed\) is not that of baseline:other here"
    with pytest.raises(RunDirectoryError, match=other):
        search(tmp_path / "parts", budget="13 trials", proposed=[("other", BASE_ALLOCATION)])
