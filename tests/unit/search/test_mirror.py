from dataclasses import replace

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from autocompress.core import BASE_ALLOCATION, Objectives, TrialRequest, TrialResult, TrialStatus
from autocompress.search.mirror import STUDY_NAME, Mirror
from autocompress.search.run_trial import run_trial
from autocompress.search.samplers import SAMPLERS
from autocompress.testing.driver_contract import scripted_context, scripted_space

SPACE = scripted_space()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    context = scripted_context(tmp_path_factory.mktemp("bank"))
    sampler = SAMPLERS["random"](SPACE, seed=0)
    requests = [TrialRequest(0, BASE_ALLOCATION, "baseline:base")]
    requests += [TrialRequest(n, sampler.ask(n), "sampler:random") for n in range(1, 12)]
    found = [run_trial(request, context=context) for request in requests]
    return [*found, TrialResult(requests[3], TrialStatus.FAILED, error="ValueError: no")]


def load(path):
    return optuna.load_study(
        study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(path)))
    )


def test_optuna_opens_the_mirror_and_finds_the_trials(tmp_path, results):
    path = tmp_path / "optuna.log"
    with Mirror(path, SPACE) as mirror:
        for result in results:
            mirror.add(result)
    trials = load(path).get_trials()
    assert len(trials) == len(results)
    for trial, result in zip(trials, results, strict=True):
        assert trial.user_attrs["id"] == result.request.allocation.digest
        assert trial.user_attrs["status"] == result.status
        assert SPACE.decode(trial.params) == result.request.allocation
        if result.metrics is None:
            assert trial.state is TrialState.FAIL
            assert trial.user_attrs["error"] == "ValueError: no"
        else:
            quality = result.metrics.quality
            assert trial.values == [quality.damage.value, result.metrics.storage_bytes]
    assert load(path).metric_names == ["damage", "storage_bytes"]
    assert len(load(path).best_trials) >= 1


def test_a_mirror_shows_the_objectives_of_the_study(tmp_path, results):
    path, objectives = tmp_path / "optuna.log", Objectives.parse("quality,latency,bytes")
    with Mirror(path, SPACE, results[:3], objectives):
        pass
    assert load(path).metric_names == ["damage", "latency_ms_per_token", "storage_bytes"]
    assert load(path).get_trials()[1].values == list(objectives.losses(results[1].metrics))


def test_a_resumed_study_rebuilds_its_mirror_from_the_journal(tmp_path, results):
    path = tmp_path / "optuna.log"
    path.write_text("left behind by a crash, torn in the mid")
    with Mirror(path, SPACE, results[:5]) as mirror:
        for result in results[5:]:
            mirror.add(result)
    numbers = [t.user_attrs["number"] for t in load(path).get_trials()]
    assert numbers == [r.request.number for r in results]


@pytest.mark.timeout(20)  # Optuna would wait half a minute for the lock
def test_a_lock_that_a_crash_left_behind_holds_no_one_up(tmp_path, results):
    path = tmp_path / "optuna.log"
    (tmp_path / "optuna.log.lock").symlink_to(path)
    with Mirror(path, SPACE) as mirror:
        mirror.add(results[0])
    assert len(load(path).get_trials()) == 1


def test_a_mirror_that_cannot_be_written_is_given_up_with_a_warning(tmp_path, results, caplog):
    (tmp_path / "file").touch()
    with Mirror(tmp_path / "file" / "optuna.log", SPACE) as mirror:
        mirror.add(results[0])
    assert "journal is not affected" in caplog.text


def test_a_disk_that_fills_up_ends_the_mirror_alone(tmp_path, results, caplog, monkeypatch):
    def full(self, logs):
        raise OSError(28, "No space left on device")

    with Mirror(tmp_path / "optuna.log", SPACE) as mirror:
        monkeypatch.setattr(JournalFileBackend, "append_logs", full)
        for result in results:
            mirror.add(result)
    assert caplog.text.count("No space left") == 1


def test_a_trial_that_was_stopped_early_is_a_pruned_one(tmp_path, results):
    path = tmp_path / "optuna.log"
    stopped = replace(results[2], status=TrialStatus.EARLY_STOPPED, error="Stopped after 4")
    with Mirror(path, SPACE) as mirror:
        mirror.add(results[1])
        mirror.add(stopped)
    trials = load(path).get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert trials[1].values is None
    assert trials[1].user_attrs["status"] == "early_stopped"
    assert [trial.number for trial in load(path).best_trials] == [0]
