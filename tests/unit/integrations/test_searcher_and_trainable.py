"""The searcher and the trainable by themselves; no Ray is started."""

import copy
import json
import math
import os
import pickle
import types
from dataclasses import replace

import numpy as np
import pytest
from ray import tune
from ray.tune.search import Searcher

from autocompress.core import BASE_ALLOCATION, Allocation, Scheme, TrialRequest, TrialStatus
from autocompress.core.errors import RunDirectoryError, SpaceError, UnknownNameError, UsageError
from autocompress.drivers.local import LocalDriver
from autocompress.integrations import ray_tune
from autocompress.integrations.asked_study import AskedStudy
from autocompress.integrations.ray_tune import (
    AutocompressSearcher,
    CompressionTrainable,
    front_of,
    param_space,
    trials_of,
    with_context,
)
from autocompress.integrations.tune_rows import config_of, request_of
from autocompress.search import SAMPLERS, Budget, Journal, Study
from autocompress.search.run_trial import run_trial
from autocompress.search.shipping import pack_context
from autocompress.search.study import baselines
from autocompress.spaces import SearchSpace
from autocompress.testing.driver_contract import scripted_context, scripted_space

SPACE = scripted_space()


def worker(context, *, space=SPACE, rungs=(1.0,), tainted=None):
    """A trainable as a worker has it, without Ray around it."""
    tainted = np.zeros(1, np.uint8) if tainted is None else tainted
    made = object.__new__(CompressionTrainable)
    parts = pack_context(context)
    shared = ray_tune._Shared(parts, space, tuple(rungs), 1, os.getcwd(), tainted)
    made.setup({}, shared=shared)
    return made


def measure(trainable, config):
    """All rows of a trial on a resident model."""
    assert trainable.reset_config(config)
    rows = [trainable.step()]
    while not rows[-1]["done"]:
        rows.append(trainable.step())
    return rows


def run(searcher, trainable, n):
    """One trial after the other, as Tune would; their configs and last rows."""
    configs, rows = [], []
    for i in range(n):
        trial_id = f"{len(searcher.told)}-{i}"
        config = searcher.suggest(trial_id)
        if config == Searcher.FINISHED:
            break
        configs.append(config)
        rows.append(measure(trainable, config)[-1])
        searcher.on_trial_complete(trial_id, rows[-1])
    return configs, rows


def grid(rows):
    """As `ResultGrid`: an iterable of results with metrics."""
    return [types.SimpleNamespace(metrics=row) for row in rows]


def few_bytes(result):
    return {"bytes": result.metrics.storage_bytes - 4000.0}


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_the_searcher_goes_through_the_same_trials_as_a_study(sampler, tmp_path):
    searcher = AutocompressSearcher(SPACE, sampler=sampler, seed=3)
    run(searcher, worker(scripted_context(tmp_path / "a")), 20)
    driver = LocalDriver(scripted_context(tmp_path / "b"))
    with Journal(tmp_path / "trials.jsonl") as journal:
        study = Study(
            SPACE, SAMPLERS[sampler](SPACE, seed=3), driver, journal, Budget.parse("20 trials")
        )
        expected = study.run()

    def told(results):
        return [r.to_json() | {"seconds": 0, "elapsed": None} for r in results][:20]

    assert told(searcher.told) == told(expected)
    assert [r.request.source for r in searcher.told][:2] == [
        "baseline:base",
        "baseline:" + SPACE.baselines()[0][0],
    ]


@pytest.mark.parametrize(
    ("sampler", "how"),
    [("tpe", "save"), ("nsga2", "pickle"), ("random", "deepcopy")],
)
def test_a_restored_searcher_goes_on_with_the_same_sequence(sampler, how, tmp_path):
    trainable = worker(scripted_context(tmp_path))
    whole = AutocompressSearcher(SPACE, sampler=sampler, seed=5, constraints=few_bytes)
    expected, _ = run(whole, trainable, 26)
    first = AutocompressSearcher(SPACE, sampler=sampler, seed=5, constraints=few_bytes)
    before, _ = run(first, trainable, 18)
    if how == "save":
        first.save_to_dir(str(tmp_path), "2026-01-01")
        second = AutocompressSearcher(SPACE, sampler=sampler, seed=5, constraints=few_bytes)
        second.restore_from_dir(str(tmp_path))
    else:
        second = pickle.loads(pickle.dumps(first)) if how == "pickle" else copy.deepcopy(first)
    after, _ = run(second, trainable, 8)
    assert before + after == expected


def test_a_trial_that_was_running_at_the_save_is_told_under_its_number(tmp_path):
    trainable = worker(scripted_context(tmp_path))
    searcher = AutocompressSearcher(SPACE, sampler="nsga2", seed=1)
    run(searcher, trainable, 17)
    number = len(searcher.told)
    config = searcher.suggest("interrupted")
    asked_state = dict(searcher._study._sampler_state(number))
    restored = pickle.loads(pickle.dumps(searcher))
    assert restored.suggest("next")["trial"]["number"] == number + 1
    restored.on_trial_complete("interrupted", measure(trainable, config)[-1])
    last = restored.told[-1]
    assert (last.request.number, last.is_complete) == (number, True)
    assert last.sampler_state == asked_state  # its generation, though asked for before the save
    assert asked_state["OrderedNsga2:generation"] is not None


def test_the_state_is_json_and_belongs_to_one_study(tmp_path):
    searcher = AutocompressSearcher(SPACE, sampler="random", seed=1)
    run(searcher, worker(scripted_context(tmp_path / "bank")), 3)
    searcher.suggest("running")
    path = tmp_path / "state.json"
    searcher.save(str(path))
    state = json.loads(path.read_text())
    assert [line["number"] for line in state["told"]] == [0, 1, 2]
    assert list(state["running"]) == ["running"]
    for other in (
        AutocompressSearcher(SPACE, sampler="random", seed=2),
        AutocompressSearcher(SPACE, sampler="nsga2", seed=1),
        AutocompressSearcher(scripted_space(bits=(2, 4)), sampler="random", seed=1),
    ):
        with pytest.raises(RunDirectoryError, match="another study"):
            other.restore(str(path))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RunDirectoryError, match=r"damaged.*backup"):
        searcher.restore(str(path))


def test_it_finishes_when_the_space_holds_nothing_further(tmp_path):
    space = scripted_space(bits=(2,))  # two options for each of three layers
    searcher = AutocompressSearcher(space, sampler="random", seed=0)
    configs, _ = run(searcher, worker(scripted_context(tmp_path), space=space), 100)
    assert len(configs) == 8
    assert searcher.suggest("more") == Searcher.FINISHED
    allocations = {request_of(c, space).allocation for c in configs}
    assert len(allocations) == 8


class Stubborn(SAMPLERS["random"]):
    """Knows one allocation."""

    def ask(self, number):
        return Allocation.of({"first": Scheme.parse("rtn(bits=8,group_size=16)")})


def test_a_repeat_is_told_the_complete_result_of_its_allocation(tmp_path):
    context = scripted_context(tmp_path)
    study = AskedStudy(SPACE, lambda: Stubborn(SPACE, seed=0))
    n_baselines = len(baselines(SPACE))
    for number in range(n_baselines):
        request = study.ask(f"baseline {number}")
        study.tell(run_trial(request, context=context))
    twice = [study.ask(name) for name in "ab"]  # the second before the first is known
    whole = run_trial(twice[1], context=context)
    study.tell(replace(whole, request=twice[0], status=TrialStatus.EARLY_STOPPED))
    study.tell(whole)
    assert study.ask("c") is None
    last = study.told[-1]
    assert (last.status, last.notes) == (
        TrialStatus.COMPLETE,
        (f"same allocation as trial {twice[1].number}",),
    )


def test_failures_stops_and_dead_workers_are_told_as_such():
    searcher = AutocompressSearcher(SPACE, sampler="nsga2", seed=0)
    for trial_id in "abc":
        searcher.suggest(trial_id)
    searcher.on_trial_complete("a", None, error=True)
    searcher.on_trial_complete("b", None)
    searcher.on_trial_complete("c", {"damage": 0.5, "done": True}, error=True)
    searcher.on_trial_complete("c", None, error=True)  # told before
    searcher.on_trial_complete("unknown", None)
    statuses = [(r.request.number, r.status) for r in searcher.told]
    assert statuses == [
        (0, TrialStatus.WORKER_DIED),
        (1, TrialStatus.EARLY_STOPPED),
        (2, TrialStatus.WORKER_DIED),
    ]


def test_another_metric_takes_the_place_of_damage(tmp_path):
    trainable = worker(scripted_context(tmp_path))
    searcher = AutocompressSearcher(SPACE, sampler="nsga2", metric="retained_quality", mode="max")
    assert searcher.metric == ["retained_quality", "storage_bytes"]
    assert searcher.mode == ["max", "min"]
    _, rows = run(searcher, trainable, 6)
    losses = [r.metrics.quality.damage.value for r in searcher.told]
    assert losses == [1 - row["retained_quality"] for row in rows]
    searcher.suggest("x")
    searcher.on_trial_complete("x", rows[-1] | {"retained_quality": math.nan})
    assert searcher.told[5].status is TrialStatus.NOT_FINITE
    best = front_of(grid(rows), metric="retained_quality", mode="max")
    assert best == front_of(grid(rows))
    assert best != front_of(grid(rows), metric="retained_quality", mode="min")


def test_the_sampler_hears_of_constraints(tmp_path):
    searcher = AutocompressSearcher(SPACE, sampler="nsga2", constraints=few_bytes)
    _, rows = run(searcher, worker(scripted_context(tmp_path)), 8)
    trials = searcher._study._sampler.study.trials
    assert [t.constraints["bytes"] for t in trials] == [row["storage_bytes"] - 4000 for row in rows]
    feasible = front_of(grid(rows), constraints=few_bytes)
    assert feasible
    assert all(r.metrics.storage_bytes <= 4000 for r in feasible)
    assert max(r.metrics.storage_bytes for r in front_of(grid(rows))) > 4000


def test_a_searcher_over_other_resources_says_so_to_tune_and_to_its_sampler(tmp_path):
    optimize = "quality,latency,bytes"
    searcher = AutocompressSearcher(SPACE, sampler="nsga2", optimize=optimize)
    assert searcher.metric == ["damage", "latency_ms_per_token", "storage_bytes"]
    assert searcher.mode == ["min"] * 3
    _, rows = run(searcher, worker(scripted_context(tmp_path)), 8)
    trials = searcher._study._sampler.study.trials
    assert all(len(t.values) == 3 for t in trials)
    best = front_of(grid(rows), optimize=optimize)
    assert {t.request.number for t in front_of(grid(rows))} <= {t.request.number for t in best}
    copied = pickle.loads(pickle.dumps(searcher))
    assert copied.get_state() == searcher.get_state()
    with pytest.raises(RunDirectoryError, match="another study"):
        AutocompressSearcher(SPACE, sampler="nsga2").set_state(searcher.get_state())
    with pytest.raises(UsageError, match="budget of one resource"):
        AutocompressSearcher(SPACE, sampler="evopress", optimize=optimize)


def test_a_row_says_what_run_trial_measured(tmp_path):
    request = TrialRequest(7, SPACE.decode({"first": 1, "second": 2, "third": 6}), "sampler:x")
    config = config_of(request, SPACE)
    assert config == {
        "first": "rtn(bits=3,group_size=16)",
        "second": "rtn(bits=4,group_size=16)",
        "third": "base",
        "trial": {"number": 7, "source": "sampler:x"},
    }
    (row,) = measure(worker(scripted_context(tmp_path / "a")), config)
    expected = run_trial(request, context=scripted_context(tmp_path / "b"))
    metrics = expected.metrics
    assert row["damage"] == row["output_error"] == metrics.quality.damage.value
    assert row["retained_quality"] == metrics.quality.retained
    assert {name: row[name] for name in metrics.resources} == {
        name: resource.value for name, resource in metrics.resources.items()
    }
    assert row["done"] is True
    (trial,) = trials_of(grid([row]))
    assert trial.metrics == metrics
    assert trial.request == request


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("fail", TrialStatus.FAILED),
        ("exhaust", TrialStatus.OUT_OF_MEMORY),
        ("nan", TrialStatus.NOT_FINITE),
    ],
)
def test_what_goes_wrong_is_a_status_with_all_columns(script, status, tmp_path):
    space = scripted_space_with(script)
    trainable = worker(scripted_context(tmp_path), space=space)
    searcher = AutocompressSearcher(space, sampler="random")
    config = searcher.suggest("a") | {"first": script}
    (bad,) = measure(trainable, config)
    (good,) = measure(trainable, config_of(TrialRequest(1, BASE_ALLOCATION, "x"), space))
    assert bad["trial_status"] == str(status)
    assert math.isnan(bad["damage"])
    assert math.isnan(bad["storage_bytes"])
    assert set(good) - set(bad) == {"output_error"}
    assert good["damage"] == 0.0
    searcher.on_trial_complete("a", bad)
    assert searcher.told[0].status is status
    assert [t.request.number for t in front_of(grid([bad, good]))] == [1]


def scripted_space_with(script):
    """The scripted space with a misbehaviour as the first layer's last option but one."""
    data = SPACE.to_json()
    options = data["choices"][0]["options"]
    options.insert(-1, {"label": script, "schemes": [script], "storage_bytes": 1})
    return SearchSpace.from_json(data)


def test_a_write_to_the_base_model_is_refused_by_all_that_share_its_memory(tmp_path):
    space = scripted_space_with("scribble")
    context = scripted_context(tmp_path)
    flag = np.zeros(1, np.uint8)
    flag.flags.writeable = False  # as Ray hands it out
    one, other = (worker(context, space=space, tainted=flag) for _ in range(2))
    sound = config_of(TrialRequest(1, BASE_ALLOCATION, "x"), space)
    assert measure(other, sound)[0]["trial_status"] == "complete"
    (bad,) = measure(one, sound | {"first": "scribble"})
    assert "second.weight" in bad["message"]
    for trainable in (one, other):
        (row,) = measure(trainable, sound)
        assert row["trial_status"] == "failed"
        assert "with_context" in row["message"]


def test_rungs_report_early_stops_until_the_last_one(tmp_path):
    context = scripted_context(tmp_path)
    trainable = worker(context, rungs=(0.25, 0.5, 1.0))
    searcher = AutocompressSearcher(SPACE, sampler="nsga2")
    config = searcher.suggest("a") | {"first": "rtn(bits=2,group_size=16)"}
    rows = measure(trainable, config)
    assert [row["trial_status"] for row in rows] == ["early_stopped"] * 2 + ["complete"]
    assert [row["tokens"] for row in rows] == [4, 12, 28]
    whole = run_trial(request_of(config, SPACE), context=scripted_context(tmp_path))
    assert rows[-1]["damage"] == whole.metrics.quality.damage.value
    assert len({row["damage"] for row in rows}) == 3
    assert front_of(grid(rows)) == trials_of(grid(rows[2:]))
    searcher.on_trial_complete("a", rows[1])
    assert searcher.told[0].status is TrialStatus.EARLY_STOPPED
    assert searcher.told[0].n_tokens == 12


def test_a_paused_trial_goes_on_elsewhere(tmp_path):
    context = scripted_context(tmp_path)
    config = config_of(TrialRequest(0, BASE_ALLOCATION, "x"), SPACE)
    one, other = (worker(context, rungs=(0.5, 1.0)) for _ in range(2))
    one.reset_config(config)
    assert one.step()["tokens"] == 8
    other.reset_config(config)
    other.load_checkpoint(one.save_checkpoint(""))
    row = other.step()
    assert (row["tokens"], row["trial_status"]) == (24, "complete")


def test_configs_of_other_searchers_are_read_and_wrong_ones_refused():
    domains = param_space(SPACE)
    assert list(domains) == ["first", "second", "third"]
    assert domains["first"].categories[-1] == "base"
    config = {name: domain.categories[0] for name, domain in domains.items()}
    assert request_of(config, SPACE).source == "tune"
    scheme = Scheme.parse("rtn(bits=2,group_size=16)")
    expected = Allocation.of(dict.fromkeys(("first", "second", "third"), scheme))
    assert request_of(config, SPACE).allocation == expected
    with pytest.raises(SpaceError, match=r"'third' got None"):
        request_of({"first": "base", "second": "base"}, SPACE)
    with pytest.raises(SpaceError, match=r"rtn\(bits=3,group_size=16\)"):
        request_of(config | {"first": "rtn(bits=3,group_size=15)"}, SPACE)


def test_the_base_model_has_a_config_even_where_no_option_is_the_base():
    data = SPACE.to_json()
    for choice in data["choices"]:
        del choice["options"][-1]
    space = SearchSpace.from_json(data)
    request = TrialRequest(0, BASE_ALLOCATION, "baseline:base")
    config = config_of(request, space)
    assert request_of(config, space) == request
    with pytest.raises(SpaceError, match="all choices or for none"):
        request_of(config | {"first": "rtn(bits=4,group_size=16)"}, space)


def test_wrong_arguments_are_refused_with_the_next_step(tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="nsga2"):
        AutocompressSearcher(SPACE, sampler="nsga3")
    with pytest.raises(UsageError, match="'min' or 'max'"):
        AutocompressSearcher(SPACE, mode="down")
    context = scripted_context(tmp_path)
    for rungs in ((), (0.5,), (0.5, 0.5, 1), (1, 0.5), (0, 1), (0.5, 2)):
        with pytest.raises(UsageError, match="ascend to 1"):
            with_context(context, SPACE, rungs=rungs)
    with pytest.raises(UsageError, match="with_context"):
        object.__new__(CompressionTrainable).setup({})
    monkeypatch.setattr(SAMPLERS["random"], "needs_table", True)
    with pytest.raises(UsageError, match="table="):
        AutocompressSearcher(SPACE, sampler="random")
    monkeypatch.setattr(type(pack_context(context)), "needs_gpu", property(lambda _: True))
    with pytest.raises(UsageError, match="gpus_per_worker=1"):
        with_context(context, SPACE)


def test_the_trainable_is_one_for_tune(tmp_path):
    trainable = with_context(scripted_context(tmp_path), SPACE, cpus_per_worker=2)
    assert issubclass(trainable, tune.Trainable)
    assert trainable.default_resource_request({}).required_resources["CPU"] == 2
    assert trainable.__name__ == "CompressionTrainable"  # Tuner.restore compares names
