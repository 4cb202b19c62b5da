"""A whole search on a rotated model: its members reload, and size and quality are honest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .conftest import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STOCK = """
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "autocompress" not in sys.modules
assert model.lm_head.weight is not model.model.embed_tokens.weight
assert bool((model.model.norm.weight == 1).all())
"""


def test_a_rotated_tied_model_is_searched_exported_and_reloaded(trained, cli, tmp_path):
    model, run = trained("qwen2"), tmp_path / "run"
    searched = cli(
        "search", model, "--rotate", "hadamard", "--space", "mixed_precision", "--sampler",
        "random", "--budget", "6 trials", "--no-finalize", "--out", run, *SMALL,
    )  # fmt: skip
    assert searched.status == 0, searched.err
    document = json.loads((run / "front.json").read_text())
    assert document["study"]["rotation"] == "hadamard"
    assert document["base"]["quality"]["retained"] == pytest.approx(1, abs=1e-3)
    weighed = cli("evaluate", model, "--tokens", 256, "--json").document
    assert document["base"]["storage_bytes"] == weighed["base_storage_bytes"]

    for checkpoint_format in ("packed", "dense"):
        exported = tmp_path / checkpoint_format
        written = cli(
            "export", run, "uniform-8bit", "--format", checkpoint_format, "--out", exported
        )
        assert written.status == 0, written.err
        manifest = json.loads((exported / "autocompress.json").read_text())
        assert manifest["verification"]["passed"]
    subprocess.run([sys.executable, "-P", "-c", STOCK, str(tmp_path / "dense")], check=True)


def test_a_model_that_cannot_be_rotated_is_refused_before_anything_is_written(
    trained, cli, tmp_path
):
    refused = cli(
        "search", trained("gemma3"), "--rotate", "hadamard", "--out", tmp_path / "run", *SMALL
    )
    assert refused.status == 2
    assert "post-norm" in refused.err
    assert "Next step: leave --rotate away" in refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "run").exists()
