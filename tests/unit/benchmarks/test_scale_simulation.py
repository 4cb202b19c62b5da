from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
import scale_simulation
from hypothesis import given, settings
from hypothesis import strategies as st
from scale_plot import Line, panels
from simulated_search import Archive, Evolution, Objective, Surrogate, area, search_gaps
from simulated_study import Scenario, Simulation

BUSY = Scenario(
    trial_seconds=10.0, spread=0.5, ask_seconds=0.2, tell_seconds=0.1, stop_shares=(0.4, 0.3),
    lifetime_seconds=40.0, restart_seconds=5.0,
)  # fmt: skip


@pytest.mark.parametrize("n", [1, 8, 64])
def test_without_overhead_and_deaths_n_workers_are_n_times_as_fast(n):
    run = Simulation(Scenario(trial_seconds=3.0), n, 128).run()
    assert run.makespan == pytest.approx(3.0 * 128 / n)
    assert run.busy == pytest.approx(3.0 * 128)
    assert run.idle == run.lost == run.restarting == run.driver_busy == 0.0


@settings(deadline=None, max_examples=60)
@given(
    n_workers=st.integers(1, 20),
    n_trials=st.integers(1, 60),
    generation=st.integers(0, 12),
    spread=st.sampled_from([0.0, 0.7]),
    overhead=st.sampled_from([0.0, 0.3, 20.0]),
    lifetime=st.sampled_from([5.0, 100.0, math.inf]),
    restart=st.sampled_from([0.0, 7.0]),
    seed=st.integers(0, 3),
)
def test_worker_seconds_are_conserved(
    n_workers, n_trials, generation, spread, overhead, lifetime, restart, seed
):
    scenario = Scenario(10.0, spread, overhead, overhead / 2, (0.3, 0.3), lifetime, restart)
    run = Simulation(scenario, n_workers, n_trials, generation=generation, seed=seed).run()
    spent = run.busy + run.lost + run.restarting + run.idle
    assert spent == pytest.approx(n_workers * run.makespan)
    assert min(run.busy, run.lost, run.restarting, run.idle) >= -1e-9
    assert run.driver_busy <= run.makespan + 1e-9
    assert 0 <= run.failed <= min(n_trials, run.deaths / 3)
    if math.isinf(lifetime):
        assert run.busy == pytest.approx(scenario.draw_work(n_trials, seed).sum())
        assert run.driver_busy == pytest.approx(1.5 * overhead * n_trials)


def test_a_study_is_no_faster_than_its_driver_or_its_longest_trial():
    slow_driver = Simulation(replace(BUSY, ask_seconds=5.0, tell_seconds=1.0), 100, 300).run()
    assert slow_driver.trials_per_second == pytest.approx(1 / 6.0, rel=0.05)
    endless = replace(BUSY, lifetime_seconds=math.inf, spread=2.0)
    assert Simulation(endless, 500, 500).run().makespan >= endless.draw_work(500, 0).max()


def test_the_driver_saturates_where_the_formula_says():
    scenario = Scenario(trial_seconds=10.0, ask_seconds=0.4, tell_seconds=0.1)
    assert scenario.saturating_workers == pytest.approx(21.0)
    below, above = (Simulation(scenario, n, 40 * n).run() for n in (15, 60))
    assert below.trials_per_second == pytest.approx(15 / 10.5, rel=0.05)
    assert above.trials_per_second == pytest.approx(1 / 0.5, rel=0.05)
    assert Scenario(10.0).saturating_workers == math.inf


def test_racing_spends_the_expected_share_of_a_full_trial():
    scenario = Scenario(trial_seconds=8.0, spread=0.3, stop_shares=(0.5, 0.25))
    assert scenario.mean_work_seconds == pytest.approx(8.0 * (0.125 + 0.125 + 0.25))
    drawn = scenario.draw_work(20_000, seed=0)
    assert drawn.mean() == pytest.approx(scenario.mean_work_seconds, rel=0.03)


def test_a_barrier_waits_for_the_slowest_of_each_generation():
    scenario = replace(BUSY, lifetime_seconds=math.inf, ask_seconds=0.0, tell_seconds=0.0)
    run = Simulation(scenario, 4, 12, generation=4).run()
    slowest = scenario.draw_work(12, 0).reshape(3, 4).max(axis=1)
    assert run.makespan == pytest.approx(slowest.sum())
    assert Simulation(scenario, 4, 12).run().makespan < run.makespan


def test_a_trial_is_given_up_after_three_deaths():
    run = Simulation(replace(BUSY, lifetime_seconds=1e-6), 3, 10).run()
    assert (run.failed, run.deaths, run.trials) == (10, 30, 10)
    assert run.busy == 0.0


def test_a_simulation_is_a_function_of_its_seed():
    first, again, other = (Simulation(BUSY, 8, 100, seed=s).run() for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_the_supported_front_is_the_best_of_all_allocations():
    objective = Objective.draw(4, seed=0)
    everything = Archive()
    for levels in itertools.product(range(5), repeat=4):
        everything.add(objective.point(np.array(levels)), np.array(levels))
    supported = objective.supported_front()
    for point in supported:
        assert not any(p[0] < point[0] - 1e-9 and p[1] < point[1] - 1e-9 for p in everything.points)
    best = area(everything.points, (0.0, 8.0))
    assert 0.9 * best < area(supported, (0.0, 8.0)) <= best + 1e-9


def test_an_archive_keeps_what_nothing_beats():
    archive = Archive()
    for point in [(3.0, 3.0), (1.0, 5.0), (2.0, 6.0), (2.0, 4.0), (2.0, 4.0), (1.0, 4.5)]:
        archive.add(point, np.zeros(1, dtype=np.int64))
    assert archive.points == [(1.0, 4.5), (2.0, 4.0), (3.0, 3.0)]
    assert area(archive.points, (4.0, 5.0)) == pytest.approx(0.5 + 1.0 + 2.0)


@pytest.mark.parametrize("make", [Evolution, Surrogate])
def test_gaps_shrink_with_trials_and_one_in_flight_needs_no_barrier(make):
    gaps = search_gaps(make, (20, 80, 240), 1, seed=0, n_choices=12)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.5 * gaps[0]
    assert gaps == search_gaps(make, (20, 80, 240), 1, seed=0, n_choices=12, barrier=True)


def test_proposals_that_know_nothing_learn_nothing():
    blind = search_gaps(Surrogate, (200,), 256, seed=0, n_choices=12)
    informed = search_gaps(Surrogate, (200,), 8, seed=0, n_choices=12)
    assert informed[0] < 0.7 * blind[0]


def test_a_picture_is_valid_svg_with_every_line():
    lines = [Line("a<b", [(1, 0.5), (8, 3.0)]), Line("a<b", [(1, 0.4), (8, 1.0)], is_faint=True)]
    text = panels("title", "", [("rate", "workers", lines, True), ("x", "y", lines, False)])
    root = ET.fromstring(text)
    assert len(root.findall(".//{*}path[@stroke-width='2']")) == 4
    assert "a<b" in "".join(root.itertext())


def test_costs_are_read_from_committed_results():
    found, assumptions = scale_simulation.scenarios(scale_simulation.RESULTS)
    assert set(found) == {"demo", "gemma-3-270m", "one-second trials"}
    assert all(s.ask_seconds > 0 and s.tell_seconds > 0 and s.spread > 0 for s in found.values())
    assert all(value["origin"] for value in assumptions.values())


def test_the_document_shows_the_committed_simulation():
    result = json.loads((scale_simulation.RESULTS / "scale_simulation.json").read_text())
    assert scale_simulation.markdown(result) in scale_simulation.DOCS.read_text(encoding="utf-8")
    assert scale_simulation.picture(result) == (
        scale_simulation.RESULTS / "scale_simulation.svg"
    ).read_text(encoding="utf-8")


def test_a_block_is_replaced_between_its_markers(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    for _ in range(2):
        scale_simulation.replace_block(file, "x", "new")
    assert file.read_text() == "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb\n"
