"""Replay tables: what they answer, how they are kept, and whole studies on them."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from autocompress.core import BASE_ALLOCATION, Allocation, Bar, Scheme, TrialRequest, TrialStatus
from autocompress.core.errors import DataError, UsageError
from autocompress.search import SAMPLERS, Budget, Journal, Study
from autocompress.search.racing import Racing
from autocompress.spaces.space import Choice, Option, SearchSpace
from autocompress.testing.replay import ReplayDriver, ReplayTable, Response, SequenceNoise

COMMITTED = Path(__file__).parents[3] / "benchmarks" / "tables" / "minilm_gptq.npz"


LINEAR = Response(ceiling=1e12)


def make_table(response=LINEAR):
    options = tuple(Option(f"{b}", (Scheme.parse(f"rtn(bits={b})"),), 10 * b) for b in (2, 4))
    choices = tuple(Choice(name, (name,), options, 160) for name in "ab")
    pairs = np.zeros((4, 4))
    pairs[0, 2] = pairs[2, 0] = 0.5
    pairs[1, 3] = pairs[3, 1] = -2.0
    space = SearchSpace("two", "two layers", choices)
    scores = {"fisher": np.array([4.0, 3.0, 2.0, -1.0])}
    singles = np.array([1.0, 0.25, 2.0, 0.125])
    return ReplayTable(space, singles, pairs, scores, 7, 100, "kl", response, {"model": "none"})


def test_an_allocation_damages_its_singles_and_pairs_but_never_less_than_nothing():
    table = make_table()
    assert table.damage((0, 0)) == pytest.approx(3.5)
    assert table.damage((1, 0)) == pytest.approx(2.25)
    assert table.damage((1, 1)) == 0.0
    assert table.storage_bytes((0, 1)) == 67


def test_the_response_bends_towards_its_ceiling():
    table = make_table(Response(gain=2.0, power=1.0, ceiling=3.0))
    assert table.damage((0, 0)) == pytest.approx(3.0 * (1 - np.exp(-7.0 / 3.0)))
    assert table.damage((1, 0)) < table.damage((0, 0)) < 3.0


def test_a_table_survives_its_file(tmp_path):
    table = make_table()
    table.save(tmp_path / "table.npz")
    loaded = ReplayTable.load(tmp_path / "table.npz")
    assert loaded.space == table.space
    assert (loaded.facts, loaded.response) == (table.facts, table.response)
    for levels in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert loaded.damage(levels) == table.damage(levels)
    assert loaded.option_table("fisher").digest == table.option_table("fisher").digest


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "other.npz", values=np.zeros(3))
    for name in ("broken.npz", "other.npz", "missing.npz"):
        with pytest.raises(DataError, match="measure_table"):
            ReplayTable.load(tmp_path / name)


def test_an_option_table_offers_singles_and_scores():
    table = make_table()
    assert table.option_table().predicted((0, 1)) == pytest.approx(1.125)
    assert table.option_table("fisher").predicted((1, 1)) == 3.0  # scores below 0 count as 0
    assert table.option_table().total("storage_bytes", (0, 1)) == table.storage_bytes((0, 1))
    with pytest.raises(UsageError, match="fisher"):
        table.option_table("fishr")


def test_the_driver_answers_the_base_and_refuses_what_is_not_in_the_space():
    driver = ReplayDriver(make_table())
    base = driver.answer(TrialRequest(0, BASE_ALLOCATION, "baseline:base"))
    assert base.metrics.quality.damage.value == 0.0
    assert base.metrics.storage_bytes == 327
    outside = Allocation.of({"c": Scheme.parse("rtn(bits=2)")})
    refused = driver.answer(TrialRequest(1, outside, "s"))
    assert refused.status is TrialStatus.FAILED
    assert "'c'" in refused.error


def request(table, levels, bar=None):
    names = [choice.name for choice in table.space.choices]
    return TrialRequest(9, table.space.decode(dict(zip(names, levels, strict=True))), "s", bar)


def test_noise_shrinks_with_sequences_and_cancels_where_it_is_common():
    table = make_table()
    errors = []
    for n in (16, 4096):
        noise = SequenceNoise(n, common=0.5, own=0.2)
        damage = ReplayDriver(table, noise=noise).answer(request(table, (0, 0))).metrics.quality
        errors.append(damage.damage.standard_error)
        assert abs(damage.damage.value - 3.5) < 5 * damage.damage.standard_error
    assert errors[1] < errors[0] / 8
    shared = ReplayDriver(table, noise=SequenceNoise(64, common=0.5, own=0.0))
    one, two = (shared.answer(request(table, v)).damages for v in ((0, 0), (1, 0)))
    np.testing.assert_allclose(np.array(one) / np.array(two), 3.5 / 2.25)


def test_a_noisy_trial_that_is_clearly_beaten_stops_early():
    table = make_table()
    driver = ReplayDriver(table, noise=SequenceNoise(64), racing=Racing())
    good = driver.answer(request(table, (1, 0)))
    beaten = driver.answer(request(table, (0, 0), Bar(1, tuple(d / 2 for d in good.damages))))
    assert beaten.status is TrialStatus.EARLY_STOPPED
    assert beaten.n_tokens < good.n_tokens == 100
    unbeaten = driver.answer(request(table, (0, 0), Bar(1, tuple(9 * d for d in good.damages))))
    assert unbeaten.is_complete


def test_requests_are_taken_as_far_ahead_as_there_are_workers():
    table, taken = make_table(), []

    def requests():
        for levels in ((0, 0), (0, 1), (1, 0), (1, 1)):
            taken.append(levels)
            yield request(table, levels)

    run = ReplayDriver(table, n_workers=3).run(requests())
    first = next(run)
    assert len(taken) == 3
    assert first.request == request(table, (0, 0))
    assert len(list(run)) == 3


def test_a_whole_study_runs_on_the_committed_table(tmp_path):
    table = ReplayTable.load(COMMITTED)
    assert COMMITTED.stat().st_size < 300_000
    assert table.facts["prediction"]["kendall"] > 0.9
    sampler = SAMPLERS["evopress"](table.space, seed=0)
    with Journal(tmp_path / "trials.jsonl") as journal, closing(ReplayDriver(table)) as driver:
        budget = Budget.parse(("60 trials",))
        results = Study(table.space, sampler, driver, journal, budget).run()
    assert len(results) == 60
    assert all(result.is_complete for result in results)
