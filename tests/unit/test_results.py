"""What the repository claims is what its committed results hold."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from autocompress.core import TrialResult
from autocompress.fronts.document import FrontDocument

ROOT = Path(__file__).parents[2]
RUNS = sorted(p.parent for p in ROOT.glob("results/*/front.json"))


def _readme_results():
    path = ROOT / "benchmarks" / "readme_results.py"
    spec = importlib.util.spec_from_file_location("readme_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_in_the_readme_are_those_of_the_committed_fronts():
    module = _readme_results()
    text = module.README.read_text(encoding="utf-8")
    assert module.updated(text) == text


def test_numbers_of_the_search_engine_are_those_of_the_committed_benchmark():
    module = _readme_results()
    text = module.ENGINE.read_text(encoding="utf-8")
    assert module.updated_engine(text) == text


def test_tables_of_the_methods_are_those_of_the_committed_benchmark():
    module = _readme_results()
    text = module.METHODS.read_text(encoding="utf-8")
    assert module.updated_methods(text) == text


@pytest.mark.parametrize("run", RUNS, ids=lambda p: p.name)
def test_a_committed_run_is_complete_and_names_no_path_of_a_machine(run):
    FrontDocument.read(run)  # validates against the schema
    lines = (run / "trials.jsonl").read_text().splitlines()
    trials = [TrialResult.from_json(json.loads(line)) for line in lines]
    assert len(trials) >= 40
    assert json.loads((run / "provenance.json").read_text())["versions"]["torch"]
    for name in ("front.json", "study.yaml", "provenance.json", "trials.jsonl", "report.html"):
        text = (run / name).read_text(encoding="utf-8")
        assert "/root/" not in text
        assert "site-packages" not in text


def test_runs_are_committed():
    assert {run.name for run in RUNS} >= {"demo", "gemma-3-270m"}
