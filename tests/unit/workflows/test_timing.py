"""What a budget of time leaves for the report, and what is said of it before the first trial."""

import pytest

from autocompress.evaluate import ForwardPlan
from autocompress.search import Budget, Spent
from autocompress.workflows.publish import MOST_MEMBERS
from autocompress.workflows.settings import SearchSettings, StudyRecord
from autocompress.workflows.timing import report_reserve, time_left


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (["9 trials"], ""),
        (["9 trials", "30m"], "Preparation took 1m 30s; 28m 20s left for trials and for measuring"),
        (["1 gpu-hours"], "Preparation took 1m 30s; 0.5 GPU-hours left"),
        (["100s"], "Preparation took 1m 30s, and no time is left: only base and baselines"),
    ],
)
def test_what_preparation_took_and_what_is_left(budget, said):
    spent = Spent(trials=3, seconds=100.0, gpu_seconds=1800.0)
    line = time_left(Budget.parse(budget), 90.2, spent)
    assert line.startswith(said)
    assert bool(line) == bool(said)


def record(report_dtype, **settings):
    seconds = {"float32": 4.0, "bfloat16": 1.0}
    plan = ForwardPlan("bfloat16", 4, 2, seconds_per_dtype=seconds, n_tokens=500)
    resolved = {"forward": plan.to_json(), "report": {"dtype": report_dtype, "batch_size": 4}}
    return StudyRecord(SearchSettings("m", **settings), resolved)


@pytest.mark.parametrize(
    ("report_dtype", "seconds"), [("float32", 12.0), ("bfloat16", 3.0), ("float16", 3.0)]
)
def test_the_reserve_is_for_the_dtype_of_the_report(report_dtype, seconds):
    reserve = report_reserve(record(report_dtype), 1000)
    assert (reserve.seconds_each, reserve.most_members) == (pytest.approx(seconds), MOST_MEMBERS)


def test_report_tokens_are_measured_by_all_workers_on_gpus_alone():
    workers = {"driver": "ray", "workers": 3}
    assert report_reserve(record("float32", **workers), 9).at_once == 1
    assert report_reserve(record("float32", **workers, device="cuda"), 9).at_once == 3
