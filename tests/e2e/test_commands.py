"""The other commands and the Python twins, on one finished run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import SMALL


@pytest.fixture(scope="module")
def run_dir(trained, tmp_path_factory) -> Path:
    """A finished search of a tiny Llama in the mixed-precision space."""
    from autocompress.cli import run

    out = tmp_path_factory.mktemp("commands") / "run"
    arguments = ["search", trained("llama"), "--space", "mixed_precision", "--budget",
                 "16 trials", "--out", out, *SMALL]  # fmt: skip
    assert run([str(a) for a in arguments]) == 0
    return out


def test_front_prints_one_json_document_and_nothing_else(cli, run_dir):
    finished = cli("front", run_dir, "--json")
    assert finished.status == 0
    assert finished.err == ""
    assert finished.document == json.loads((run_dir / "front.json").read_text())


def test_no_member_is_beaten_by_another_in_both_quality_and_bytes(cli, run_dir):
    document = cli("front", run_dir, "--json").document
    points = [(m["storage_bytes"], -m["quality"]["retained"]) for m in document["members"]]
    assert len(points) > 3
    rivals = points + [
        (m["storage_bytes"], -m["quality"]["retained"]) for m in document["baselines"]
    ]
    for member in points:
        assert not any(r[0] <= member[0] and r[1] <= member[1] and r != member for r in rivals)


def test_a_pick_by_size_is_the_smallest_member_that_fits(cli, run_dir):
    members = cli("front", run_dir, "--json").document["members"]
    picked = cli("pick", run_dir, "--by", "size", "--json").document
    assert picked["storage_bytes"] == min(m["storage_bytes"] for m in members)
    limit = sorted(m["storage_bytes"] for m in members)[0]
    best = cli("pick", run_dir, "--by", "quality", "--max-bytes", limit, "--json").document
    assert best["storage_bytes"] == limit
    without = cli("pick", run_dir, "--by", "quality", "--json").document
    assert without["quality"]["retained"] == max(m["quality"]["retained"] for m in members)
    assert without["storage_bytes"] > limit


def test_the_command_line_and_python_pick_and_judge_alike(cli, run_dir):
    import autocompress as ac

    run = ac.load_run(run_dir)
    picked = run.front.pick(by="quality")
    assert picked.id == cli("pick", run_dir, "--by", "quality", "--json").document["id"]
    verdict = ac.gate(run_dir, min_quality=0.5)
    assert verdict.to_json() == cli("gate", run_dir, "--min-quality", 0.5, "--json").document


def test_the_cost_efficiency_of_a_member_is_that_of_the_public_function(run_dir):
    import autocompress as ac
    from autocompress.objectives import relative_resources

    document = ac.load_run(run_dir).document
    for member in document.members:
        resources = relative_resources(member.resources, document.base.resources)
        score = ac.cost_efficiency(
            performance=member.quality.retained,
            resources=resources,
            size_reduction=member.size_reduction,
        )
        assert member.cost_efficiency == pytest.approx(score, rel=1e-9)


def test_a_dense_export_loads_without_this_package(cli, run_dir, tmp_path):
    out = tmp_path / "dense"
    finished = cli("export", run_dir, "uniform-4bit", "--out", out, "--format", "dense")
    assert finished.status == 0, finished.err
    code = (
        "import sys, transformers; "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}); "
        "assert 'autocompress' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_evaluate_measures_an_export_as_its_manifest_claims(cli, run_dir, tmp_path):
    out = tmp_path / "packed"
    assert cli("export", run_dir, "uniform-3bit", "--out", out, "--no-verify").status == 0
    claim = json.loads((out / "autocompress.json").read_text())["claim"]
    measured = cli("evaluate", out, "--json").document
    assert measured["storage_bytes"] == claim["storage_bytes"]
    assert measured["quality"]["retained"] == pytest.approx(claim["quality"]["retained"], abs=1e-4)


def test_evaluate_needs_nothing_that_only_the_machine_of_the_search_had(cli, run_dir, tmp_path):
    out = tmp_path / "packed"
    assert cli("export", run_dir, "uniform-3bit", "--out", out, "--no-verify").status == 0
    manifest = json.loads((out / "autocompress.json").read_text())
    manifest["claim"]["measured"]["settings"] |= {
        "device": "cuda:99",
        "device_profile": str(tmp_path / "gone.json"),
    }
    (out / "autocompress.json").write_text(json.dumps(manifest))
    measured = cli("evaluate", out, "--json")
    assert measured.status == 0, measured.err
    claimed = manifest["claim"]["quality"]["retained"]
    assert measured.document["quality"]["retained"] == pytest.approx(claimed, abs=1e-4)


def test_a_member_with_numbers_that_were_not_finite_is_exported(cli, run_dir, tmp_path):
    copied = Path(shutil.copytree(run_dir, tmp_path / "run"))
    front = json.loads((copied / "front.json").read_text())
    member = next(b for b in front["baselines"] if b["name"] == "uniform-2bit")
    member["quality"]["metrics"]["perplexity"] = {"value": None, "standard_error": None}
    member["cost_efficiency"] = None
    (copied / "front.json").write_text(json.dumps(front))
    out = tmp_path / "packed"
    done = cli("export", copied, "uniform-2bit", "--out", out, "--no-verify")
    assert done.status == 0, done.err
    claim = json.loads((out / "autocompress.json").read_text())["claim"]
    assert claim["quality"] == member["quality"]


def test_evaluate_of_the_base_retains_everything(cli, trained):
    measured = cli("evaluate", trained("llama"), "--tokens", "1024", "--json").document
    assert measured["quality"]["retained"] == pytest.approx(1.0)
    assert measured["size_reduction"] == 1.0


def test_report_is_written_again_from_what_the_run_holds(cli, run_dir):
    page = run_dir / "report.html"
    page.unlink()
    assert cli("report", run_dir).status == 0
    text = page.read_text()
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="?https?:', text)  # self-contained


def test_spaces_show_counts_what_the_space_gives_on_the_model(cli, trained):
    shown = cli("spaces", "show", "quick", "--model", trained("llama"), "--json").document
    assert shown["n_layers"] == 16
    assert cli("spaces").status == cli("methods").status == cli("version").status == 0


def test_trials_say_what_was_predicted_for_them(run_dir):
    lines = [json.loads(line) for line in (run_dir / "trials.jsonl").read_text().splitlines()]
    proposed = [line for line in lines if line["source"] == "sampler:guided"]
    assert proposed
    assert all("predicted_log_damage" in line["sampler_state"] for line in proposed)


def test_a_new_budget_is_solved_from_the_run_alone(cli, run_dir):
    front = cli("front", run_dir, "--json").document
    sizes = sorted(m["storage_bytes"] for m in front["members"])
    finished = cli("solve", run_dir, "--max-bytes", sizes[len(sizes) // 2], "--json")
    assert finished.status == 0, finished.err
    (solution,) = finished.document
    assert solution["resources"]["storage_bytes"] <= sizes[len(sizes) // 2]
    assert solution["damage"]["low"] < solution["damage"]["value"] < solution["damage"]["high"]
    table = cli("solve", run_dir)
    assert "not measured" in table.out
    too_small = cli("solve", run_dir, "--max-bytes", 10)
    assert too_small.status == 2
    assert "bytes, but the limit is 10. Next step: give at least that" in too_small.err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_differentiable_search_trains_once_and_proposes(trained, cli, tmp_path):
    arguments = ("search", trained("llama"), "--space", "quick", "--sampler", "dnas",
                 "--cache", tmp_path / "cache", "--no-finalize", *SMALL)  # fmt: skip
    written = set()
    for run in ("first", "second"):
        out = tmp_path / run
        done = cli(*arguments, "--budget", "12 trials", "--out", out)
        assert done.status == 0, done.err
        lines = [json.loads(x) for x in (out / "trials.jsonl").read_text().splitlines()]
        assert any(line["source"] == "sampler:dnas" for line in lines)
        assert json.loads((out / "predictions.json").read_text())["table"]["preferences"]
        (kept,) = (tmp_path / "cache" / "training").iterdir()
        written.add((kept.name, kept.stat().st_mtime_ns))
    assert len(written) == 1


def test_samplers_are_listed_with_what_they_use(cli):
    rows = {row["name"]: row for row in cli("samplers", "--json").document}
    assert rows["guided"]["needs_table"]
    assert not rows["random"]["adaptive"]
    assert rows["dnas"]["needs_training"]
    assert "evopress" in cli("samplers").out


def test_help_and_front_import_no_torch(run_dir):
    code = (
        "import sys; from autocompress.cli import run; "
        f"run(['front', {str(run_dir)!r}]); run(['gate', {str(run_dir)!r}, '--min-quality', '2']); "
        "loaded = {'torch', 'transformers', 'ray', 'optuna', 'datasets'} & set(sys.modules); "
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def _command(model: Path, out: Path, *more: str, sampler: str = "nsga2") -> list[str]:
    return [sys.executable, "-m", "autocompress", "search", str(model), "--space",
            "mixed_precision", "--sampler", sampler, "--out", str(out), *SMALL, *more]  # fmt: skip


def _wait_for_trials(out: Path, n: int, process: subprocess.Popen) -> None:
    journal = out / "trials.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= n):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_ctrl_c_ends_with_a_valid_front(trained, tmp_path, cli):
    out = tmp_path / "run"
    command = _command(trained("llama"), out, "--budget", "5000 trials")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _wait_for_trials(out, 12, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors
    assert cli("front", out, "--json").document["members"]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("sampler", ["nsga2", "guided"])
def test_killed_and_resumed_equals_uninterrupted(trained, tmp_path, cli, sampler):
    model, killed, whole = trained("llama"), tmp_path / "killed", tmp_path / "whole"
    command = _command(model, killed, "--budget", "60 trials", sampler=sampler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _wait_for_trials(killed, 20, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (killed / "front.json").exists()
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    again = _command(model, whole, "--budget", "60 trials", sampler=sampler)
    subprocess.run(again, check=True, capture_output=True)
    assert _archive(killed) == _archive(whole)
    fronts = [json.loads((d / "front.json").read_text())["members"] for d in (killed, whole)]
    assert fronts[0] == fronts[1]
    assert any("name" not in member for member in fronts[0])


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_cold_cache_gives_the_front_of_a_warm_one(trained, tmp_path, cli):
    model, out, again = trained("llama"), tmp_path / "run", tmp_path / "again"
    arguments = ("search", model, "--space", "joint", "--sampler", "random", "--budget",
                 "10 trials", *SMALL)  # fmt: skip
    assert cli(*arguments, "--out", out).status == 0
    again.mkdir()
    shutil.copy(out / "study.yaml", again)
    shutil.copytree(out / "cache", again / "cache")
    assert cli(*arguments, "--out", again, "--resume").status == 0
    assert _archive(out) == _archive(again)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_labelled_text_is_searched_exported_and_reloaded(trained, tmp_path, cli):
    from transformers import AutoTokenizer

    model, out, data = trained("bert-classifier"), tmp_path / "run", tmp_path / "data.jsonl"
    data.write_text(_first_token_classes(AutoTokenizer.from_pretrained(model)))
    searched = cli("search", model, "--data", data, "--space", "quick", "--budget", "8 trials",
                   "--out", out, *SMALL)  # fmt: skip
    assert searched.status == 0, searched.err
    document = json.loads((out / "front.json").read_text())
    assert document["base"]["quality"]["metrics"]["accuracy"]["value"] > 0.6
    exported = cli("export", out, document["members"][0]["id"], "--out", tmp_path / "x")
    assert exported.status == 0, exported.err


def _first_token_classes(tokenizer) -> str:
    """Sentences labelled as the tiny classifier was trained: by their first token."""
    from pydoc_data.topics import topics

    lines = [s.strip() for text in topics.values() for s in text.split("\n") if len(s) > 40]
    rows = []
    for line in dict.fromkeys(lines):
        first = tokenizer(line)["input_ids"][1]
        rows.append(json.dumps({"text": line, "label": first % 4}))
    return "\n".join(rows[:600])


def _archive(directory: Path) -> list[dict]:
    lines = (directory / "trials.jsonl").read_text().splitlines()
    timed = ("seconds", "elapsed")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_and_two_ray_workers_and_no_ray_give_the_same_archive(trained, tmp_path):
    archives = []
    for name, more in {
        "local": (),
        "one": ("--driver", "ray"),
        "two": ("--driver", "ray", "--workers", "2"),
    }.items():
        command = _command(trained("llama"), tmp_path / name, "--budget", "20 trials", *more)
        command[command.index("nsga2")] = "random"
        subprocess.run(command, check=True, capture_output=True)
        archives.append(_measured(tmp_path / name))
    assert archives[0].keys() == archives[1].keys() == archives[2].keys()
    for digest, damage in archives[0].items():
        assert archives[1][digest] == pytest.approx(damage, abs=1e-6)
        assert archives[2][digest] == pytest.approx(damage, abs=1e-6)


def _measured(directory: Path) -> dict[str, float]:
    """Damage by digest of the allocation."""
    return {t["id"]: t["metrics"]["quality"]["damage"]["value"] for t in _archive(directory)}
