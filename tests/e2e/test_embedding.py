"""An embedding model that does not take the mean: searched, exported and verified as it is used."""

from __future__ import annotations

import json

import pytest
import torch

from .conftest import SMALL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first_token_model(tmp_path_factory):
    """A model whose pipeline takes the first token."""
    from autocompress.testing.tiny_models import save_tiny, tiny_model

    path = tmp_path_factory.mktemp("embedding") / "model"
    model = tiny_model("bert-encoder")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "attention" in name and weight.ndim == 2:
                weight.mul_(10)  # an untrained first token hardly looks at the text
    save_tiny("bert-encoder", path, model=model)
    (path / "1_Pooling").mkdir()
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    config = {"word_embedding_dimension": 64, **flags}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"}
        for i, (p, t) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    return path


@pytest.mark.timeout(400)
def test_the_pooling_of_the_model_is_in_every_record_and_in_the_verification(
    first_token_model, cli, tmp_path
):
    run, out = tmp_path / "run", tmp_path / "out"
    searched = cli(
        "search", first_token_model, "--space", "quick", "--budget", "5 trials", "--out", run,
        *SMALL,
    )  # fmt: skip
    assert searched.status == 0, searched.err
    assert "feature-extraction (pooling: cls)" in searched.err
    assert json.loads((run / "front.json").read_text())["study"]["pooling"] == "cls"
    written = cli("export", run, "uniform-4bit", "--out", out)
    assert written.status == 0, written.err
    manifest = json.loads((out / "autocompress.json").read_text())
    assert manifest["claim"]["measured"]["pooling"] == "cls"
    assert manifest["verification"]["passed"]
    # an export is measured as it was, whatever its base model says later
    config = first_token_model / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode": "mean"}))
    found = cli("evaluate", out, "--json")
    assert found.document["pooling"] == "cls"
    claimed = manifest["claim"]["quality"]["retained"]
    assert found.document["quality"]["retained"] == pytest.approx(claimed, abs=1e-4)
    refused = cli("export", run, "uniform-4bit", "--out", tmp_path / "other")
    assert refused.status == 2
    assert "measured with pooling 'cls'" in refused.err
