"""What only Ray can get wrong: memory, environment, and the death of the process that drives."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from autocompress.core.errors import UsageError
from autocompress.drivers import environment
from autocompress.drivers.local import LocalDriver
from autocompress.search import SAMPLERS, Budget, Journal, Study, read_journal
from autocompress.testing.driver_contract import scripted_context, scripted_space

SPACE = scripted_space(group_sizes=(8, 16, 32))


@pytest.fixture(scope="module")
def started_ray():
    from autocompress.drivers.ray import start_ray, stop_ray

    started = start_ray(workers=2)
    yield
    if started:
        stop_ray()


def search(directory, driver, budget):
    with Journal(directory / "trials.jsonl") as journal, closing(driver):
        sampler = SAMPLERS["random"](SPACE, seed=2)
        return Study(SPACE, sampler, driver, journal, Budget.parse(budget)).run()


def archive(results):
    lines = [r.to_json() | {"seconds": 0, "elapsed": None} for r in results]
    return sorted(lines, key=lambda line: line["number"])


@pytest.mark.slow
@pytest.mark.usefixtures("started_ray")
def test_local_and_one_and_two_workers_find_the_same_archive(tmp_path):
    from autocompress.drivers.ray import RayDriver

    local = search(tmp_path / "local", LocalDriver(scripted_context(tmp_path / "a")), "40 trials")
    for workers in (1, 2):
        context = scripted_context(tmp_path / f"bank-{workers}")
        found = search(
            tmp_path / f"ray-{workers}", RayDriver(context, workers=workers), "40 trials"
        )
        assert archive(found) == archive(local)


@pytest.mark.slow
@pytest.mark.usefixtures("started_ray")
def test_workers_map_the_model_from_the_object_store(tmp_path):
    import ray

    from autocompress.search.shipping import pack_context

    class Probe:
        def __init__(self, parts):
            self.context = parts.build()

        def owners(self):
            """Files that the tensors of the model are mapped from, and their alignment."""
            found = set()
            for tensor in self.context.module.parameters():
                address = tensor.data_ptr()
                with open("/proc/self/maps") as maps:
                    for line in maps:
                        low, high = (int(x, 16) for x in line.split()[0].split("-"))
                        if low <= address < high:
                            found.add((line.split()[5].split("/")[-1][:6], address % 64))
            return found

    parts = ray.put(pack_context(scripted_context(tmp_path)))
    actor = ray.remote(Probe).remote(parts)
    assert ray.get(actor.owners.remote()) == {("plasma", 0)}
    ray.kill(actor)


SCRIPT = """
import sys
from pathlib import Path
from contextlib import closing
from autocompress.drivers.ray import RayDriver
from autocompress.search import SAMPLERS, Budget, Journal, Study
from autocompress.testing.driver_contract import scripted_context, scripted_space

directory, budget = Path(sys.argv[1]), sys.argv[2]
space = scripted_space(group_sizes=(8, 16, 32))
with (
    Journal(directory / "trials.jsonl") as journal,
    closing(RayDriver(scripted_context(directory / "bank"), workers=2)) as driver,
):
    study = Study(space, SAMPLERS["random"](space, seed=2), driver, journal, Budget.parse(budget))
    results = study.run()
    print(len(results), study.interrupted, flush=True)
"""


def started(directory):
    """A search in a process of its own, once it has finished some trials."""
    # More than it can do before the signal.
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), "5000 trials"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    journal = directory / "trials.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 12:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def n_ray_processes(process):
    """Processes of the session that the search started."""
    listing = subprocess.run(
        ["ps", "-o", "pid=", "-s", str(process.pid)], capture_output=True, text=True, check=False
    )
    return len(listing.stdout.split())


@pytest.mark.slow
@pytest.mark.timeout(360)
def test_ctrl_c_ends_the_search_with_a_valid_journal_and_no_process_left(tmp_path):
    process = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    out, err = process.communicate(timeout=180)  # Ray stops slowly on a busy machine
    assert process.returncode == 0, err
    n_results, interrupted = out.split()
    contents = read_journal(tmp_path / "trials.jsonl")
    assert (len(contents.results), contents.torn) == (int(n_results), b"")
    assert interrupted == "True"
    assert "Traceback" not in err
    deadline = time.monotonic() + 60
    while n_ray_processes(process) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert n_ray_processes(process) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("started_ray")
def test_killed_and_resumed_on_two_workers_equals_uninterrupted(tmp_path):
    from autocompress.drivers.ray import RayDriver

    process = started(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    n_before = len(read_journal(tmp_path / "trials.jsonl").results)
    budget = f"{n_before + 20} trials"
    driver = RayDriver(scripted_context(tmp_path / "bank"), workers=2)
    resumed = search(tmp_path, driver, budget)
    whole = search(tmp_path / "whole", LocalDriver(scripted_context(tmp_path / "w")), budget)
    # Which trials were under way at the kill is a matter of luck; a gap is filled, none is lost.
    assert archive(resumed) == archive(whole)


def test_a_cluster_that_does_not_exist_is_a_clear_error(monkeypatch):
    from autocompress.drivers import ray as driver

    def init(**_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(driver.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(driver.ray, "init", init)
    with pytest.raises(UsageError, match=r"no Ray cluster at 'auto'.*ray start --head"):
        driver.start_ray(1, address="auto")


def test_what_the_user_has_set_in_the_environment_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    environment.prepare()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")


def test_a_model_on_a_gpu_needs_workers_with_gpus(tmp_path, monkeypatch):
    from autocompress.drivers.ray import RayDriver
    from autocompress.search.shipping import ContextParts

    monkeypatch.setattr(ContextParts, "needs_gpu", property(lambda _: True))
    with pytest.raises(UsageError, match="--gpus-per-worker 1"):
        RayDriver(scripted_context(tmp_path), workers=1)


def test_importing_the_local_driver_starts_no_ray():
    script = (
        "import sys, json; import autocompress.drivers.local; import autocompress.search.study;"
        "print(json.dumps('ray' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) is False


def test_reading_a_journal_waits_for_no_heavy_library():
    script = (
        "import sys, json; from autocompress.search import read_journal, Budget;"
        "print(json.dumps([m for m in ('torch', 'ray', 'optuna') if m in sys.modules]))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
