"""Files of sentence-transformers go along with an exported embedding model."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from autocompress.export.companions import copy_companions

LIBRARY = "sentence_transformers.models."
POOLING, DENSE = LIBRARY + "Pooling", LIBRARY + "Dense"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def pipeline(root, *modules):
    """A model folder with modules of (folder, kind) after the transformer."""
    whole = [("", LIBRARY + "Transformer"), *modules]
    root.mkdir(parents=True, exist_ok=True)
    (root / "modules.json").write_text(
        json.dumps([{"idx": i, "path": path, "type": kind} for i, (path, kind) in enumerate(whole)])
    )
    for path, _ in modules:
        (root / path).mkdir(parents=True, exist_ok=True)
        (root / path / "config.json").write_text("{}")
    (root / "sentence_bert_config.json").write_text("{}")
    return root


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


PLAIN = {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}


def test_the_pipeline_is_copied(tmp_path, out, caplog):
    source = pipeline(
        tmp_path / "source", ("1_Pooling", POOLING), ("2_Normalize", LIBRARY + "Normalize")
    )
    copy_companions(str(source), out)
    assert files(out) == PLAIN | {"2_Normalize/config.json"}
    assert caplog.records == []


def test_the_pipeline_of_a_hub_id_is_copied_from_the_local_cache(tmp_path, out, hub_cache):
    source = pipeline(tmp_path / "source", ("1_Pooling", POOLING), ("2_Dense", DENSE))
    save_file({"weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    copy_companions(hub_cache(source), out)
    assert files(out) == PLAIN | {"2_Dense/config.json", "2_Dense/model.safetensors"}


def test_a_model_that_is_not_in_the_cache_has_no_pipeline(out, hub_cache, caplog):
    copy_companions("sentence-transformers/all-MiniLM-L6-v2", out)
    assert files(out) == set()
    assert caplog.records == []


def test_weights_of_a_module_go_along_as_safetensors_and_not_as_pickles(tmp_path, out):
    source = pipeline(tmp_path / "source", ("1_Pooling", POOLING), ("2_Dense", DENSE))
    save_file({"weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    copy_companions(str(source), out)
    assert files(out) == PLAIN | {"2_Dense/config.json", "2_Dense/model.safetensors"}


def test_a_pipeline_with_pickled_weights_alone_is_lost_with_a_warning(tmp_path, out, caplog):
    source = pipeline(tmp_path / "source", ("1_Pooling", POOLING), ("2_Dense", DENSE))
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    lost(str(source), out, caplog, "2_Dense/pytorch_model.bin is neither JSON nor safetensors")


def test_so_is_one_of_a_hub_id(tmp_path, out, caplog, hub_cache):
    source = pipeline(tmp_path / "source", ("1_Pooling", POOLING), ("2_Dense", DENSE))
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    lost(hub_cache(source), out, caplog, "2_Dense/model.safetensors is neither in the local cache")


def test_so_is_one_with_code_of_the_repository(tmp_path, out, caplog):
    source = pipeline(tmp_path / "source", ("1_Pooling", "custom_st.Pooling"))
    lost(str(source), out, caplog, "custom_st.Pooling is code of the repository")


def test_so_is_one_that_points_outside_its_folder(tmp_path, out, caplog):
    source = pipeline(tmp_path / "a" / "source", ("../secret", POOLING))
    lost(str(source), out, caplog, "'../secret' leads out of the model")


def lost(source, out, caplog, reason):
    with caplog.at_level(logging.WARNING):
        copy_companions(source, out)
    assert files(out) == set()
    (record,) = caplog.records
    text = record.getMessage()
    assert reason in text
    assert "loses the model's sentence-transformers pipeline" in text
    assert "Next step" in text
    assert "\n" not in text


def test_a_model_without_a_pipeline_gets_none(tmp_path, out, caplog):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "sentence_bert_config.json").write_text("{}")
    copy_companions(str(tmp_path / "source"), out)
    assert files(out) == set()
    assert caplog.records == []
