"""Solving for a new budget from what a search left behind, without a model."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import autocompress as ac
from autocompress.core import (
    Measurement,
    Metrics,
    Objectives,
    Quality,
    Resource,
    Scheme,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.core.errors import RunDirectoryError, UsageError
from autocompress.search.journal import JOURNAL_FILE, Journal
from autocompress.search.option_table import OptionTable
from autocompress.spaces import Choice, Option, SearchSpace
from autocompress.workflows.predictions import PREDICTIONS, Predictions
from autocompress.workflows.solve import solve_run

BITS = (2, 4, 8)
ROLES = ("query", "down")
N_BLOCKS = 4
TRULY_HARMFUL = "down"
FIXED = 1000.0


def predictions():
    """Both roles are predicted alike."""
    names = [f"{block}.{role}" for block in range(N_BLOCKS) for role in ROLES]
    options = tuple(Option(f"rtn {b}", (Scheme.parse(f"rtn(bits={b})"),), 100 * b) for b in BITS)
    space = SearchSpace("two", "", tuple(Choice(n, (n,), options, 1600) for n in names))
    damage = np.array([0.2, 0.02, 0.002])
    table = OptionTable(
        names=tuple(names),
        roles=tuple(n.partition(".")[2] for n in names),
        depths=tuple(i / len(names) for i in range(len(names))),
        labels=tuple(tuple(o.label for o in options) for _ in names),
        damage=tuple(damage for _ in names),
        costs={
            "storage_bytes": tuple(np.array([100.0 * b for b in BITS]) for _ in names),
            "latency_ms_per_token": tuple(np.array([0.1 * b for b in BITS]) for _ in names),
        },
        fixed={"storage_bytes": FIXED, "latency_ms_per_token": 1.0},
    )
    return Predictions(space, table)


def true_damage(predicted, levels):
    """One role does ten times what was predicted, the other a tenth."""
    factor = [10.0 if role == TRULY_HARMFUL else 0.1 for role in predicted.table.roles]
    return sum(f * d[i] for f, d, i in zip(factor, predicted.table.damage, levels, strict=True))


@pytest.fixture
def run(tmp_path):
    predicted = predictions()
    predicted.write(tmp_path)
    generator = np.random.default_rng(0)
    with Journal(tmp_path / JOURNAL_FILE) as journal:
        for number in range(30):
            levels = generator.integers(0, len(BITS), len(predicted.table.names))
            damage = true_damage(predicted, levels)
            size = predicted.table.total("storage_bytes", levels.tolist())
            names = predicted.table.names
            request = TrialRequest(
                number,
                predicted.space.decode(dict(zip(names, map(int, levels), strict=True))),
                "sampler:guided",
            )
            quality = Quality(float(np.exp(-damage)), 0.0, Measurement(damage, 0.0), {}, 10)
            metrics = Metrics(quality, {"storage_bytes": Resource(size, "bytes", "analytic")})
            journal.append(TrialResult(request, TrialStatus.COMPLETE, metrics))
    return tmp_path


def bits_by_role(solution):
    found = {role: [] for role in ROLES}
    for name, scheme in solution.allocation.items():
        found[name.partition(".")[2]].append(dict(scheme.stages[0].options)["bits"])
    return {role: np.mean(bits) for role, bits in found.items()}


def test_trials_correct_the_prediction_of_the_solution(run):
    """The predictions alone cannot tell the roles apart; the trials show which one is harmful."""
    (solution,) = solve_run(run, max_bytes=FIXED + 100 * 4 * len(ROLES) * N_BLOCKS)
    bits = bits_by_role(solution)
    assert bits["down"] > bits["query"]
    assert solution.resources["storage_bytes"] <= FIXED + 3200
    predicted = predictions()
    levels = list(predicted.space.encode(solution.allocation).values())
    assert solution.low < true_damage(predicted, levels) < solution.high


def test_the_python_twin_takes_text_as_the_command_line_does(run):
    assert ac.solve(str(run), max_bytes="4.2kB") == solve_run(run, max_bytes=4200)
    with pytest.raises(UsageError, match="Example: 60MB"):
        ac.solve(run, max_bytes="4.2k")


def test_another_resource_can_be_the_budget(run):
    (solution,) = solve_run(run, max_latency_ms=1.0 + 0.1 * 4 * len(ROLES) * N_BLOCKS)
    assert solution.resources["latency_ms_per_token"] <= 4.2 + 1e-9


def test_without_a_budget_the_predicted_front_is_given(run):
    solutions = solve_run(run)
    sizes = [s.resources["storage_bytes"] for s in solutions]
    assert len(solutions) > 5
    assert sizes == sorted(sizes)
    assert solutions[0].damage > solutions[-1].damage
    assert solutions[0].to_json()["origin"] == "predicted, not measured"


def test_without_a_budget_the_front_is_over_what_the_search_optimized(run):
    predicted = replace(predictions(), objectives=Objectives.parse("quality,latency"))
    predicted.write(run)
    assert Predictions.read(run).objectives == predicted.objectives
    times = [s.resources["latency_ms_per_token"] for s in solve_run(run)]
    assert times == sorted(times)
    assert len(set(times)) > 5


def test_a_budget_below_the_smallest_names_the_smallest(run):
    with pytest.raises(UsageError, match="2,600"):
        solve_run(run, max_bytes=2000)


@pytest.mark.parametrize("odd", [0.1234567, 12.3456789, 1234567.89])
def test_the_smallest_that_is_named_is_enough(run, odd):
    predicted = predictions()
    fixed = dict.fromkeys(predicted.table.fixed, odd)
    Predictions(predicted.space, replace(predicted.table, fixed=fixed)).write(run)
    with pytest.raises(UsageError) as least_time:
        solve_run(run, max_latency_ms=0.1)
    (named,) = re.findall(r"([\d.e+]+) ms per token", str(least_time.value))
    assert solve_run(run, max_latency_ms=float(named))
    with pytest.raises(UsageError) as least_size:
        solve_run(run, max_bytes=1)
    (named,) = re.findall(r"([\d,]+) bytes", str(least_size.value))
    assert solve_run(run, max_bytes=int(named.replace(",", "")))


@pytest.mark.parametrize("limit", ["max_bytes", "max_latency_ms"])
def test_a_budget_that_is_no_number_is_refused(run, limit):
    with pytest.raises(UsageError, match="but the limit is nan"):
        solve_run(run, **{limit: float("nan")})


def test_two_budgets_are_refused(run):
    with pytest.raises(UsageError, match="One budget"):
        solve_run(run, max_bytes=1e6, max_latency_ms=3.0)


def test_a_run_without_predictions_says_what_to_do(tmp_path):
    with pytest.raises(RunDirectoryError, match="--sampler guided"):
        solve_run(tmp_path, max_bytes=1e6)


def test_damaged_predictions_are_named(run):
    (run / PREDICTIONS).write_text("{", encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="is damaged"):
        solve_run(run, max_bytes=1e6)


def test_predictions_are_read_back_as_written(run):
    again = Predictions.read(run)
    assert again.space == predictions().space
    assert again.table.digest == predictions().table.digest
