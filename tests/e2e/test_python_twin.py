"""The Python twin, called again and in other orders, and the gate on exports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autocompress.core.errors import CheckpointError

SMALL = {
    "budget": 4, "space": "quick", "calibration_tokens": 256, "search_tokens": 128,
    "report_tokens": 128, "sequence_length": 64, "finalize": False, "sampler": "random",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    import autocompress as ac

    return ac.search(trained("llama"), out=tmp_path_factory.mktemp("twin") / "run", **SMALL)


def test_verbs_can_be_called_again_whatever_was_imported(trained, tmp_path, run):
    import autocompress as ac
    import autocompress.evaluate
    import autocompress.search

    again = ac.search(trained("llama"), out=tmp_path / "again", aim="60kB", **SMALL)
    assert [m.id for m in again.front] == [m.id for m in run.front]
    assert len(run.front) > 1
    assert run.front[0].id == run.front[run.front[0].id].id == next(iter(run.front)).id
    assert ac.evaluate(str(trained("llama")), tokens=128).quality.retained == pytest.approx(1)
    assert autocompress.search.Study is not None
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        _ = ac.serch


def test_a_subpackage_that_is_imported_first_is_still_a_verb():
    code = (
        "import autocompress.search as s, autocompress as ac; assert callable(ac.search), s.Study"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gate_wants_an_export_that_its_reload_verified(run, tmp_path):
    import autocompress as ac

    path = Path(run.front.pick(by="quality", min_quality=0).export(tmp_path / "good"))
    assert ac.gate(path, max_bytes="1GB").passed
    manifest = json.loads((path / "autocompress.json").read_text())
    manifest["verification"]["passed"] = False
    (path / "autocompress.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="failed its verification"):
        ac.gate(path, max_bytes="1GB")
    manifest["verification"] = None
    (path / "autocompress.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="was not verified"):
        ac.gate(path, max_bytes="1GB")


def test_cost_efficiency_of_another_format_is_not_known(run, tmp_path):
    import autocompress as ac

    member = run.front.pick(by="quality", min_quality=0)
    path = member.export(tmp_path / "dense", checkpoint_format="dense")
    assert not ac.gate(path, min_cost_efficiency=0.0).passed
    assert ac.gate(path, min_quality=0.0).passed


def test_a_directory_with_nothing_but_a_cache_is_new(trained, tmp_path):
    import autocompress as ac

    (tmp_path / "run" / "cache").mkdir(parents=True)
    assert len(ac.search(trained("llama"), out=tmp_path / "run", **SMALL).front)
