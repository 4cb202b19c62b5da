"""A model whose classes ship with it: its export runs them only for a caller who says so."""

from __future__ import annotations

import json

import pytest
import torch

from autocompress.core.errors import CheckpointError, ModelError
from autocompress.export import load
from autocompress.export.formats import EXPORTERS
from autocompress.export.manifest import MANIFEST_FILE
from autocompress.models import load_base_model
from autocompress.testing.tiny_models import save_tiny
from autocompress.workflows.evaluate import evaluate_model
from autocompress.workflows.settings import SearchSettings

from .conftest import compress_all, expected_outputs, outputs

CAUSAL = "AutoModelForCausalLM"


@pytest.fixture
def own_base(own_code, tmp_path):
    folder = own_code(save_tiny("llama", tmp_path / "base"))
    return load_base_model(str(folder), CAUSAL, trust_remote_code=True)


@pytest.mark.parametrize("name", ["packed", "dense"])
def test_an_export_with_code_of_its_own_loads_if_it_is_asked_for(name, own_base, tmp_path):
    weights = compress_all(own_base)
    out = tmp_path / "out"
    manifest = EXPORTERS[name].write(own_base, weights, out, claim={})
    assert "modeling_own.py" in manifest.files  # held to its checksum like any other file
    loaded = load(out, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    assert torch.equal(outputs(loaded, "llama"), expected_outputs(own_base, weights, "llama"))
    measured = EXPORTERS[name].load(out, dtype=None, device="cpu", trust_remote_code=True)
    assert torch.equal(outputs(measured, "llama"), outputs(loaded, "llama"))


@pytest.mark.parametrize("name", ["packed", "dense"])
def test_it_is_refused_otherwise_with_the_next_step(name, own_base, tmp_path):
    out = tmp_path / "out"
    EXPORTERS[name].write(own_base, compress_all(own_base), out, claim={})
    message = r"runs only if you ask for it.*read its \.py files.*\(--trust-remote-code\)"
    with pytest.raises(CheckpointError, match=message):
        load(out)
    with pytest.raises(CheckpointError, match=message):
        EXPORTERS[name].load(out, dtype=None, device="cpu")


def test_the_settings_of_an_export_do_not_allow_its_code_to_run(own_base, tmp_path, own_code):
    data = tmp_path / "text.txt"
    data.write_text("Some words to read, and then a few others.\n" * 60)
    settings = SearchSettings(
        own_base.source, data=str(data), sequence_length=16, trust_remote_code=True,
        calibration_tokens=32, search_tokens=32, report_tokens=32,
    )  # fmt: skip
    measured = {"settings": settings.to_json(), "dtype": "float32", "batch_size": 2}
    out = tmp_path / "out"
    EXPORTERS["packed"].write(own_base, compress_all(own_base), out, claim={"measured": measured})
    stated = json.loads((out / MANIFEST_FILE).read_text())["claim"]["measured"]["settings"]
    assert stated["trust_remote_code"] is True
    with pytest.raises(ModelError, match="--trust-remote-code"):
        evaluate_model(str(out))
    found = evaluate_model(str(out), trust_remote_code=True)
    assert found.quality.n_tokens >= 32
