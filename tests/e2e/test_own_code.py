"""A search that may run the model's own code is exported and verified; evaluate asks again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .conftest import SMALL

pytestmark = pytest.mark.slow


@pytest.mark.timeout(400)
def test_from_search_to_evaluation(own_code, trained, cli, tmp_path):
    base = own_code(Path(shutil.copytree(trained("llama"), tmp_path / "base")))
    run, out = tmp_path / "run", tmp_path / "out"
    search = ("search", base, "--space", "quick", "--budget", "5 trials", "--out", run, *SMALL)
    refused = cli(*search)
    assert refused.status == 2, refused.err
    assert "--trust-remote-code" in refused.err
    assert cli(*search, "--trust-remote-code").status == 0
    written = cli("export", run, "uniform-4bit", "--out", out)
    assert written.status == 0, written.err
    assert json.loads((out / "autocompress.json").read_text())["verification"]["passed"]
    refused = cli("evaluate", out, "--json")
    assert refused.status == 2
    assert "--trust-remote-code" in refused.err
    found = cli("evaluate", out, "--json", "--trust-remote-code")
    assert found.status == 0, found.err
    assert cli("gate", out, "--max-bytes", "1MB").status == 0  # a gate loads no model
    assert cli("spaces", "show", "quick", "--model", base).status == 2
    assert cli("spaces", "show", "quick", "--model", base, "--trust-remote-code").status == 0
