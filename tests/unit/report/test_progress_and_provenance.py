from __future__ import annotations

import io
import json
import re
import subprocess
from types import SimpleNamespace

import pytest
from rich.console import Console

from autocompress.report.progress import StudyProgress
from autocompress.report.provenance import (
    collect_provenance,
    cpu_model,
    installed_versions,
    source_commit,
)


def at(number, of=20, n_failed=0):
    return SimpleNamespace(
        n_done=number,
        n_early_stopped=max(0, number - 10),
        n_failed=n_failed,
        fraction=number / of,
        remaining=f"{of - number} trials",
        best=("x", "y"),
    )


def run_through(progress):
    with progress:
        progress.step("Loading [bold]model")
        for number in range(1, 21):
            progress.trial(at(number))
        progress.step("Measuring 12 models on report tokens")


def test_a_log_gets_one_line_per_step_and_per_tenth_of_the_budget():
    stream = io.StringIO()
    run_through(StudyProgress(enabled=True, console=Console(file=stream, width=100)))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Loading [bold]model"
    assert lines[1] == " 10%  2 trials, 2 on the front, 18 trials left"
    assert lines[-2].startswith("100%  20 trials (10 stopped early), 2 on the front")
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("number", "n_failed", "said"),
    [
        (1, 0, "1 trial, 2"),
        (9, 3, "9 trials (3 failed), 2"),
        (12, 3, "12 trials (2 stopped early, 3 failed), 2"),
    ],
)
def test_a_log_says_how_many_trials_failed(number, n_failed, said):
    stream = io.StringIO()
    progress = StudyProgress(enabled=True, console=Console(file=stream, width=100))
    progress.trial(at(number, of=number, n_failed=n_failed))
    assert f"100%  {said} on the front" in stream.getvalue()


def test_a_terminal_gets_a_bar_with_the_time_left():
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True)
    run_through(StudyProgress(enabled=True, console=console))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "Searching" in text
    assert re.search(r"Loading \[bold\]model \(\d+ s\)", text)
    assert re.search(r"Searching \(\d+ s\)", text)


def test_a_step_that_counts_gets_a_bar_on_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True)
    with StudyProgress(enabled=True, console=console) as progress:
        progress.step("Collecting [layer] statistics")
        for done in range(1, 9):
            progress.advance(done, 8)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "8 of 8" in text
    assert text.count("Collecting [layer] statistics (") == 1


def test_a_line_between_steps_takes_no_time():
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True)
    with StudyProgress(enabled=True, console=console) as progress:
        progress.step("Loading")
        progress.say("28m [left]")
        progress.step("Measuring")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert re.search(r"Loading \(\d+ s\)\s+28m \[left\]\s*\n", text)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_disabled_progress_writes_nothing(terminal):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal)
    run_through(StudyProgress(enabled=False, console=console))
    assert stream.getvalue() == ""


def test_progress_goes_to_stderr(capfd):
    run_through(StudyProgress(enabled=True))
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading" in err


def test_an_error_takes_the_bar_down():
    def interrupted():
        with shown:
            shown.trial(at(3))
            raise KeyboardInterrupt

    shown = StudyProgress(enabled=True, console=Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not shown._trials.live.is_started


def test_provenance_is_json_and_says_where_and_with_what():
    facts = json.loads(json.dumps(collect_provenance(["/usr/bin/autocompress", "search", "a b"])))
    assert facts["command"] == "autocompress search 'a b'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", facts["time_utc"])
    assert facts["machine"]["cores"] >= 1
    assert {"python", "torch", "transformers", "optuna"} <= set(facts["versions"])


def test_running_the_package_as_a_module_is_called_by_its_name():
    command = collect_provenance(["/x/autocompress/__main__.py", "search"])["command"]
    assert command == "autocompress search"


def test_packages_that_are_not_installed_are_left_out():
    assert installed_versions(["numpy", "no-such-package-at-all"]).keys() == {"numpy"}


def test_the_processor_has_a_name():
    assert cpu_model()


def git(directory, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@y.z", "-C", str(directory), *arguments],
        check=True, capture_output=True,
    )  # fmt: skip


def test_the_commit_is_that_of_the_checkout_and_marked_when_files_differ(tmp_path):
    git(tmp_path, "init", "--quiet")
    inside = tmp_path / "package"
    inside.mkdir()
    assert source_commit(inside) is None
    (inside / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = source_commit(inside)
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (inside / "a.py").write_text("2")
    assert source_commit(inside) == f"{commit} with uncommitted changes"
    ignored = tmp_path / "site-packages"
    ignored.mkdir()
    assert source_commit(ignored) is None


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_commit(tmp_path) is None
