"""What runs have spent of time: counted while they run, read from their journals."""

from autocompress.core import BASE_ALLOCATION, Elapsed, TrialRequest, TrialResult, TrialStatus
from autocompress.search.clock import Clock, spent_before


def result(number, seconds, elapsed=None):
    request = TrialRequest(number, BASE_ALLOCATION, "sampler:random")
    return TrialResult(request, TrialStatus.COMPLETE, seconds=seconds, elapsed=elapsed)


def test_a_clock_counts_the_gpus_that_are_held_meanwhile(ticking):
    clock = Clock(1)
    ticking.now += 10
    clock.hold(4)
    ticking.now += 5
    assert clock.elapsed == Elapsed(15.0, 30.0)
    clock.add(Elapsed(100.0, 7.0))
    ticking.now += 1
    assert clock.elapsed == Elapsed(116.0, 41.0)


def test_a_journal_says_what_was_spent_when_its_last_trial_ended():
    # Trial 3 ran on a worker of its own, so it is journaled before trial 2.
    rows = [result(1, 40.0, Elapsed(41.0, 2.0)), result(3, 5.0, Elapsed(60.0, 3.0)),
            result(2, 30.0, Elapsed(80.0, 4.0))]  # fmt: skip
    assert spent_before(rows, 9, 9) == Elapsed(80.0, 4.0)


def test_rows_that_do_not_say_are_spread_over_the_workers():
    assert spent_before([result(0, 10.0), result(1, 30.0)], 2, 4) == Elapsed(20.0, 80.0)
    assert spent_before([], 2, 4) == Elapsed()


def test_rows_of_an_older_version_after_rows_that_say_are_added():
    rows = [result(0, 10.0), result(1, 10.0, Elapsed(25.0, 0.0)), result(2, 30.0)]
    assert spent_before(rows, 1, 0) == Elapsed(55.0, 0.0)


def test_a_row_keeps_what_was_spent():
    whole = result(0, 1.0, Elapsed(1.5, 3.0))
    assert TrialResult.from_json(whole.to_json()) == whole
    assert "elapsed" not in result(0, 1.0).to_json()
