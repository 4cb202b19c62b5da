import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from optuna.trial import TrialState

from autocompress.core import (
    Allocation,
    Bar,
    Measurement,
    Metrics,
    Quality,
    Resource,
    Scheme,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.drivers.local import LocalDriver
from autocompress.search.budget import Budget
from autocompress.search.journal import Journal, read_journal
from autocompress.search.racing import Racing, Rivals
from autocompress.search.run_trial import run_trial
from autocompress.search.samplers import SAMPLERS, outcome
from autocompress.search.shipping import pack_context
from autocompress.search.study import Study
from autocompress.spaces.space import Choice, Option, SearchSpace
from autocompress.testing.driver_contract import LAYERS, WIDTH, scripted, scripted_context

RACING = Racing()
FOUR, TWO = "rtn(bits=4,group_size=16)", "rtn(bits=2,group_size=16)"


def space_with_bytes():
    """Two, three and four bits, with bytes as stored."""
    options = tuple(
        Option(text, (Scheme.parse(text),), WIDTH * WIDTH * bits // 8)
        for text, bits in (("rtn(bits=2)", 2), ("rtn(bits=3)", 3), ("rtn(bits=4)", 4))
    )
    # a careless option: the size of four bits, the damage of two
    careless = Option(TWO, (Scheme.parse(TWO),), WIDTH * WIDTH // 2)
    return SearchSpace("s", "s", tuple(Choice(n, (n,), (*options, careless)) for n in LAYERS))


def raced(tmp_path, **racing):
    return scripted_context(tmp_path).with_racing(Racing(**racing))


def with_bar(scheme, bar, number=5):
    return replace(scripted(number, scheme), bar=bar)


def bar_of(scheme, context):
    return Bar(0, run_trial(scripted(0, scheme), context=context).damages)


@pytest.mark.parametrize(
    ("n", "ends"),
    [(1, (1,)), (7, (7,)), (8, (4, 8)), (12, (6, 12)), (16, (4, 8, 16)), (100, (25, 50, 100))],
)
def test_rungs_are_nested_heads_and_short_ones_are_merged(n, ends):
    assert RACING.ends(n) == ends


def test_a_candidate_that_is_worse_on_every_sequence_is_beaten():
    rival = (1.0, 2.0, 3.0, 4.0, 5.0)
    assert RACING.is_beaten([1.1, 2.12, 3.09, 4.1], Bar(0, rival))
    assert RACING.is_beaten([1.5, 2.5, 3.5, 4.5], Bar(0, rival))
    assert not RACING.is_beaten([0.9, 1.9, 2.9, 3.9], Bar(0, rival))
    assert not RACING.is_beaten(rival[:4], Bar(0, rival))


def test_doubt_is_to_the_candidates_advantage():
    rival = Bar(0, (1.0, 2.0, 3.0, 4.0))
    assert not RACING.is_beaten([1.1, 2.9, 3.0, 4.3], rival)
    assert Racing(confidence=0.6).is_beaten([1.1, 2.9, 3.0, 4.3], rival)
    assert not RACING.is_beaten([2.0, 3.0, 4.0], rival)  # too few
    assert not RACING.is_beaten([2.0, 3.0, 4.0, 5.0], Bar(0, (1.0, 2.0)))  # another split


def result_of(number, damage, damages=(1.0,), status=TrialStatus.COMPLETE):
    quality = Quality(1.0, 0.0, Measurement(damage, 0.0), {}, 1)
    metrics = Metrics(quality, {"storage_bytes": Resource(1.0, "bytes", "analytic")})
    request = TrialRequest(number, Allocation(), "test")
    return TrialResult(request, status, metrics, damages=damages)


def test_the_rival_is_the_best_trial_of_no_more_bytes():
    rivals = Rivals()
    for number, (size, damage) in enumerate([(10, 1.0), (20, 0.5), (15, 2.0), (30, 0.7)]):
        rivals.add((size,), result_of(number, damage))
    assert [rivals.bar((size,)) and rivals.bar((size,)).trial for size in (9, 10, 19, 20, 99)] == [
        None, 0, 0, 1, 1,
    ]  # fmt: skip
    rivals.add((12,), result_of(7, 0.1))
    assert [rivals.bar((size,)).trial for size in (11, 12, 99)] == [0, 7, 7]


def test_trials_that_cannot_be_compared_are_no_rivals():
    rivals = Rivals()
    rivals.add((1,), result_of(0, 0.1, damages=()))
    rivals.add((1,), result_of(1, 0.1, status=TrialStatus.EARLY_STOPPED))
    assert rivals.bar((10,)) is None


def test_costs_without_a_table_are_the_bytes_of_the_options():
    space = space_with_bytes()
    two = Allocation.of(dict.fromkeys(LAYERS, Scheme.parse("rtn(bits=2)")))
    sampler = SAMPLERS["random"](space, seed=0)
    assert sampler.costs_of(two) == (3 * WIDTH * WIDTH // 4,)
    assert sampler.costs_of(Allocation()) is None


def test_a_race_that_is_run_to_the_end_measures_what_one_pass_does(tmp_path):
    whole = run_trial(scripted(0, FOUR), context=scripted_context(tmp_path))
    pieces = run_trial(scripted(0, FOUR), context=raced(tmp_path))
    assert len(raced(tmp_path).rungs) == 3
    assert pieces.is_complete
    assert pieces.n_tokens == whole.n_tokens == 16
    assert pieces.damages == pytest.approx(whole.damages, rel=1e-5)
    assert pieces.metrics.quality.damage.value == pytest.approx(
        whole.metrics.quality.damage.value, rel=1e-6
    )


def test_a_clearly_beaten_trial_stops_at_the_first_rung(tmp_path):
    context = raced(tmp_path, confidence=0.95)
    result = run_trial(with_bar(TWO, bar_of(FOUR, context)), context=context)
    assert result.status is TrialStatus.EARLY_STOPPED
    assert not result.is_complete
    assert not result.has_failed
    assert result.n_tokens == 4
    assert len(result.damages) == 4
    assert result.metrics.quality.n_tokens == 4
    assert "4 of 16 sequences" in result.error
    assert "than trial 0, which takes no more of what is optimized" in result.error


def test_a_better_or_equal_trial_is_measured_to_the_end(tmp_path):
    context = raced(tmp_path)
    plain = run_trial(scripted(5, FOUR), context=context)
    for rival in (TWO, FOUR):
        result = run_trial(with_bar(FOUR, bar_of(rival, context)), context=context)
        assert replace(result, seconds=0.0) == replace(plain, seconds=0.0)


def test_without_rungs_or_bar_nothing_stops(tmp_path):
    context = raced(tmp_path)
    bar = bar_of(FOUR, context)
    assert run_trial(with_bar(TWO, bar), context=scripted_context(tmp_path)).is_complete
    assert run_trial(scripted(0, TWO), context=context).is_complete


def test_a_broken_trial_is_not_finite_after_the_first_rung(tmp_path):
    context = raced(tmp_path)
    result = run_trial(with_bar("nan", bar_of(FOUR, context)), context=context)
    assert result.status is TrialStatus.NOT_FINITE
    assert result.n_tokens == 4
    assert result.damages == ()


def test_damages_survive_the_journal_exactly_and_old_journals_still_read(tmp_path):
    result = run_trial(scripted(0, "rtn(bits=3)"), context=raced(tmp_path))
    line = json.loads(json.dumps(result.to_json()))
    assert TrialResult.from_json(line).damages == result.damages
    assert len(result.damages) == 16
    del line["damages"]
    assert TrialResult.from_json(line).damages == ()


def test_a_bar_is_no_part_of_a_requests_identity(tmp_path):
    assert with_bar(FOUR, Bar(1, (1.0,))) == scripted(5, FOUR)


class Careless(SAMPLERS["random"]):
    """Proposes the careless option for each layer in turn."""

    def ask(self, number):
        four = dict.fromkeys(LAYERS, Scheme.parse("rtn(bits=4)"))
        return Allocation.of({**four, LAYERS[number % 3]: Scheme.parse(TWO)})


def study_of(tmp_path, budget="7 trials", **more):
    space = space_with_bytes()
    seen = []
    with (
        Journal(tmp_path / "trials.jsonl") as journal,
        closing(LocalDriver(raced(tmp_path / "bank", confidence=0.95))) as driver,
    ):
        sampler = Careless(space, seed=0)
        study = Study(
            space, sampler, driver, journal, Budget.parse(budget), progress=seen.append, **more
        )
        results = study.run()
    return results, study, seen, sampler


def test_a_study_stops_what_is_beaten_and_counts_its_tokens(tmp_path):
    results, study, seen, sampler = study_of(tmp_path)
    proposals = [r for r in results if not r.request.is_baseline]
    assert all(r.is_complete for r in results if r.request.is_baseline)
    assert [r.status for r in proposals] == [TrialStatus.EARLY_STOPPED] * len(proposals)
    assert len(proposals) == 3
    assert study.spent.tokens == 16 * (len(results) - 3) + 4 * 3
    assert seen[-1].n_early_stopped == 3
    assert not {r.request.number for r in proposals} & {r.request.number for r in seen[-1].best}
    states = [t.state for t in sampler.study.trials if t.state is not TrialState.RUNNING]
    assert states.count(TrialState.PRUNED) == 3
    assert list(read_journal(tmp_path / "trials.jsonl").results) == results


def test_a_study_goes_on_after_early_stopped_trials(tmp_path):
    study_of(tmp_path, budget="6 trials")
    results, _, seen, _ = study_of(tmp_path, budget="7 trials")
    assert len(results) == 7
    assert seen[-1].n_early_stopped == 3


def test_racing_can_be_turned_off(tmp_path):
    results, *_ = study_of(tmp_path, racing=None)
    assert all(r.is_complete for r in results)


@pytest.mark.parametrize("name", ["random", "tpe", "nsga2"])
def test_samplers_live_with_trials_that_were_stopped_early(tmp_path, name):
    space = space_with_bytes()
    sampler = SAMPLERS[name](space, seed=1)
    context = raced(tmp_path)
    for number in range(40):
        request = TrialRequest(number, sampler.ask(number), "sampler:test")
        result = run_trial(request, context=context)
        if number % 2:
            result = replace(result, status=TrialStatus.EARLY_STOPPED)
        sampler.tell(result)
    assert outcome(result, None) == {"state": TrialState.PRUNED}
    states = [trial.state for trial in sampler.study.trials]
    assert states.count(TrialState.PRUNED) == states.count(TrialState.COMPLETE) == 20


def test_a_context_with_rungs_can_be_shipped(tmp_path):
    context = raced(tmp_path, confidence=0.95)
    shipped = pack_context(context).build()
    bar = bar_of(FOUR, context)
    for request in (scripted(0, FOUR), with_bar(TWO, bar)):
        one, other = (run_trial(request, context=c) for c in (context, shipped))
        assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
    assert one.is_early_stopped
    assert shipped.prefix.reason == ""


@pytest.mark.parametrize(("n_rivals", "most"), [(1, 0.01), (10, 0.04)])
def test_as_many_equal_candidates_are_lost_as_is_said(n_rivals, most):
    generator, n_sequences, n_candidates = np.random.default_rng(0), 16, 2000
    ends = RACING.ends(n_sequences)[:-1]
    lost = 0
    for _ in range(n_candidates):
        rivals = generator.standard_normal((n_rivals, n_sequences))
        bar = Bar(0, tuple(rivals[rivals.mean(1).argmin()]))
        own = generator.standard_normal(n_sequences)
        lost += any(RACING.is_beaten(own[:end], bar) for end in ends)
    assert lost / n_candidates < most + 2.5 * (most / n_candidates) ** 0.5
    assert lost > 0
