"""Wrong input gives one clear line and the right exit status, and damages nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import SMALL


@pytest.fixture
def refused(cli):
    """Runs a command that must be refused with exit status 2 and a message without traceback."""

    def call(*arguments, says: str, status: int = 2) -> str:
        finished = cli(*arguments)
        assert finished.status == status, finished.err + finished.out
        assert "Traceback" not in finished.err
        assert finished.out == ""
        assert says in finished.err
        return finished.err

    return call


@pytest.fixture
def llama(trained, tmp_path) -> Path:
    """A private copy of a tiny model, to be broken."""
    return Path(shutil.copytree(trained("llama"), tmp_path / "llama"))


def test_an_unknown_model_path_names_the_nearest_one(refused, llama):
    message = refused("search", llama.parent / "lama", says="llama")
    assert "lama" in message


def test_a_task_that_the_architecture_cannot_do_is_refused(refused, llama, tmp_path):
    refused("search", llama, "--task", "masked-lm", "--out", tmp_path / "run", says="masked-lm")
    assert not (tmp_path / "run").exists()


def test_a_misspelt_task_gets_the_nearest_name(refused, llama):
    refused("search", llama, "--task", "casual-lm", says="causal-lm")


@pytest.mark.parametrize(("content", "says"), [("", "empty"), ("Too short.\n", "token")])
def test_empty_and_too_short_data_are_refused(refused, llama, tmp_path, content, says):
    data = tmp_path / "data.txt"
    data.write_text(content)
    refused("search", llama, "--data", data, "--out", tmp_path / "run", says=says)
    assert not (tmp_path / "run").exists()


def test_a_missing_data_file_names_the_nearest_one(refused, llama, tmp_path):
    (tmp_path / "corpus.txt").write_text("text")
    refused("search", llama, "--data", tmp_path / "corpsu.txt", says="corpus.txt")


def test_a_space_that_matches_nothing_names_what_it_could_have_meant(refused, llama, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text(
        "schema_version: 1\nname: mine\ndescription: nothing\n"
        "choices:\n  - layers: ['model.layers.*.mlp.upp_proj']\n    options: [base]\n"
    )
    refused("search", llama, "--space", space, *SMALL, says="up_proj")


def test_a_yaml_typo_is_located(refused, llama, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("schema_version: 1\nname: [mine\n")
    refused("search", llama, "--space", space, *SMALL, says="line")


def test_an_unknown_space_gets_the_nearest_name(refused, llama):
    refused("search", llama, "--space", "jiont", *SMALL, says="joint")


@pytest.mark.parametrize("budget", ["0 trials", "-5m", "soon", "0"])
def test_an_impossible_budget_is_refused_before_anything_is_loaded(refused, budget):
    refused("search", "no-model-needed", "--budget", budget, says="budget")


def test_an_unknown_sampler_gets_the_nearest_name(refused):
    refused("search", "no-model-needed", "--sampler", "nsga", says="nsga2")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--optimize", "quality,latncy"], "Did you mean 'latency'"),
        (["--optimize", "bytes,latency"], "--optimize quality,bytes,latency"),
        (["--optimize", "quality,latency", "--aim", "60MB"], "time per token"),
        (["--optimize", "quality,macs", "--aim", "60MB"], "leave --aim away"),
        (["--optimize", "quality,bytes,latency", "--sampler", "hawq"], "guided, nsga2"),
    ],
)
def test_objectives_that_cannot_be_are_refused_before_anything_is_loaded(refused, options, says):
    refused("search", "no-model-needed", *options, says=says)


def test_workers_without_ray_are_refused(refused):
    refused("search", "no-model-needed", "--workers", "2", says="--driver ray")


def test_a_directory_that_is_not_empty_is_left_alone(refused, llama, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    refused("search", llama, "--out", out, says="not empty")
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_written_is_an_error(refused, llama):
    refused("search", llama, "--out", "/proc/autocompress", *SMALL, says="cannot be written")


def test_a_file_as_run_directory_is_an_error(refused, llama, tmp_path):
    (tmp_path / "file").write_text("")
    refused("search", llama, "--out", tmp_path / "file", says="file")


def test_nan_in_weights_is_named(refused, llama, tmp_path):
    weights = load_file(llama / "model.safetensors")
    name = next(n for n in weights if "up_proj" in n)
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    refused("search", llama, "--out", tmp_path / "run", *SMALL, says=name)


@pytest.mark.parametrize("size", [0, 1000])
def test_an_empty_or_truncated_weight_file_is_an_error(refused, llama, size):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused("search", llama, *SMALL, says="model.safetensors")


def test_commands_on_a_directory_that_is_no_run_say_so(refused, tmp_path):
    for command in (("front",), ("pick",), ("report",)):
        refused(*command, tmp_path, says="front.json")
    refused("export", tmp_path, "m", "--out", tmp_path / "x", says="front.json")
    refused("gate", tmp_path, "--min-quality", 0.9, says="neither")


def test_a_quality_in_percent_is_answered_with_the_share(refused, finished_run):
    for command in ("pick", "gate"):
        refused(command, finished_run, "--min-quality", 97, says="Did you mean 0.97?")


def test_a_damaged_front_is_named(refused, tmp_path):
    (tmp_path / "front.json").write_text("{")
    refused("front", tmp_path, says="damaged")


@pytest.fixture(scope="module")
def finished_run(trained, tmp_path_factory) -> Path:
    """A small finished run of a tiny model."""
    from autocompress.cli import run

    out = tmp_path_factory.mktemp("finished") / "run"
    arguments = ["search", trained("llama"), "--space", "quick", "--sampler", "random", "--budget",
                 "6 trials", "--out", out, *SMALL]  # fmt: skip
    assert run([str(a) for a in arguments]) == 0
    return out


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    """A private copy of the finished run."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_a_damaged_line_in_the_journal_stops_a_resume_and_changes_nothing(
    refused, run_copy, trained
):
    journal = run_copy / "trials.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    damaged = lines[0] + lines[1][:40] + "\n" + "".join(lines[2:])
    journal.write_text(damaged)
    refused(
        "search", trained("llama"), "--space", "quick", "--sampler", "random", "--budget",
        "8 trials", "--out", run_copy, "--resume", *SMALL, says="line 2",
    )  # fmt: skip
    assert journal.read_text() == damaged


def test_a_line_torn_by_a_crash_is_set_aside_and_its_trial_run_again(cli, run_copy, trained):
    journal = run_copy / "trials.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-30])
    finished = cli(
        "search", trained("llama"), "--space", "quick", "--sampler", "random", "--budget",
        "6 trials", "--out", run_copy, "--resume", *SMALL,
    )  # fmt: skip
    assert finished.status == 0, finished.err
    timeless = [_without_seconds(line) for line in whole.splitlines()]
    assert [_without_seconds(line) for line in journal.read_bytes().splitlines()] == timeless


def _without_seconds(line: bytes) -> dict:
    return {k: v for k, v in json.loads(line).items() if k not in ("seconds", "elapsed")}


def test_resuming_under_other_settings_names_the_setting(refused, run_copy, trained):
    refused(
        "search", trained("llama"), "--space", "quick", "--sampler", "tpe", "--budget", "8 trials",
        "--out", run_copy, "--resume", *SMALL, says="sampler",
    )  # fmt: skip


def test_resuming_over_other_objectives_is_refused(refused, run_copy, trained):
    refused(
        "search", trained("llama"), "--space", "quick", "--sampler", "random", "--budget",
        "8 trials", "--optimize", "quality,latency", "--out", run_copy, "--resume", *SMALL,
        says="optimize (was 'quality,bytes', now 'quality,latency')",
    )  # fmt: skip


def test_a_pick_that_nothing_fits_exits_1(refused, finished_run):
    refused("pick", finished_run, "--max-bytes", "1kB", says="bytes", status=1)


def test_a_gate_that_fails_exits_1_and_shows_each_check(cli, finished_run):
    finished = cli("gate", finished_run, "--max-bytes", "1kB", "--json")
    assert finished.status == 1
    assert not finished.document["passed"]
    assert [c["name"] for c in finished.document["checks"]] == ["storage_bytes"]
    assert cli("gate", finished_run, "--max-bytes", "1GB").status == 0


def test_an_unknown_member_gets_the_nearest_names(refused, finished_run, tmp_path):
    refused("export", finished_run, "uniform-3bits", "--out", tmp_path / "x", says="uniform-3bit")


def test_an_export_never_overwrites(refused, finished_run, tmp_path):
    (tmp_path / "kept").write_text("mine")
    refused("export", finished_run, "uniform-4bit", "--out", tmp_path, says="already holds files")
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_named(cli, refused, finished_run, tmp_path, damage):
    out = tmp_path / "exported"
    assert cli("export", finished_run, "uniform-4bit", "--out", out, "--no-verify").status == 0
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-10] ^= 0xFF
    path.write_bytes({"truncate": data[:-100], "flip": data, "empty": b""}[damage])
    refused("evaluate", out, says="model.safetensors")
