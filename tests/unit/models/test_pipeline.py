"""The sentence-transformers pipeline of a folder and of a hub repository in the local cache."""

from __future__ import annotations

import json
import logging

import pytest

from autocompress.core.errors import ModelError
from autocompress.models.pipeline import has_pipeline, read_pipeline, read_pooling

LIBRARY = "sentence_transformers.models."


def pipeline(folder, config, kind=LIBRARY + "Pooling", path="1_Pooling"):
    """A model folder with a transformer, a pooling module and a normalisation."""
    modules = [("", LIBRARY + "Transformer"), (path, kind), ("2_Normalize", LIBRARY + "Normalize")]
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(
        json.dumps([{"idx": i, "path": p, "type": t} for i, (p, t) in enumerate(modules)])
    )
    if config is not None:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls+mean"),
        ({"embedding_dimension": 8, "pooling_mode": "max"}, "max"),
        ({"pooling_mode": ["mean", "cls"]}, "mean+cls"),
        ({"pooling_mode_mean_tokens": False}, "mean"),
        ({}, "mean"),
    ],
)
def test_both_spellings_of_a_pooling_are_read(tmp_path, config, pooling):
    assert read_pooling(str(pipeline(tmp_path, config))) == pooling


def test_a_newer_dotted_name_is_the_same_module(tmp_path):
    kind = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    assert read_pooling(str(pipeline(tmp_path, {"pooling_mode": "cls"}, kind))) == "cls"


@pytest.mark.parametrize("kind", [LIBRARY + "SpladePooling", "custom_st.Pooling"])
def test_another_kind_of_pooling_gives_its_class(tmp_path, kind):
    assert read_pooling(str(pipeline(tmp_path, {}, kind))) == kind.removeprefix(LIBRARY)


def test_without_a_pipeline_it_is_the_mean(tmp_path, caplog):
    assert read_pooling(str(tmp_path)) == "mean"
    assert read_pipeline(str(tmp_path)) == ()
    assert not has_pipeline(str(tmp_path))
    (tmp_path / "modules.json").write_text("[]")
    assert read_pooling(str(tmp_path)) == "mean"
    assert caplog.records == []


def test_a_folder_that_is_gone_has_no_pipeline(tmp_path, hub_cache):
    (tmp_path / "source").mkdir()
    hub_cache(tmp_path / "source")
    assert not has_pipeline(str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "JSONDecodeError"), ("[3]", "TypeError"), ('[{"path": ""}]', "KeyError"),
     ('[{"path": "../x", "type": "x"}]', "leads out of the model")],
)  # fmt: skip
def test_a_damaged_pipeline_is_refused(tmp_path, text, problem):
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ModelError, match=rf"modules.json: .*{problem}.*\. Next step: download"):
        read_pooling(str(tmp_path))


def test_a_pooling_whose_config_is_missing_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"1_Pooling/config.json: it is missing\. Next step"):
        read_pooling(str(pipeline(tmp_path, None)))


def test_a_hub_id_is_looked_up_in_the_local_cache(tmp_path, hub_cache):
    source = hub_cache(pipeline(tmp_path / "source", {"pooling_mode_cls_token": True}))
    assert has_pipeline(source)
    assert read_pooling(source) == "cls"


def test_a_repository_without_a_pipeline_is_the_mean(tmp_path, hub_cache, caplog):
    (tmp_path / "source").mkdir()
    source = hub_cache(tmp_path / "source", absent=("modules.json",))
    assert read_pooling(source) == "mean"
    assert caplog.records == []


def test_what_neither_cache_nor_hub_can_say_is_a_warning(tmp_path, hub_cache, caplog):
    (tmp_path / "source").mkdir()
    source = hub_cache(tmp_path / "source")
    with caplog.at_level(logging.WARNING):
        assert read_pooling(source) == "mean"
    assert "someone/model/modules.json is not in the local cache" in caplog.text
