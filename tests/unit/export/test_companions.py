"""Files of sentence-transformers go along with an exported embedding model."""

from __future__ import annotations

import json

from autocompress.export.companions import copy_companions


def _pipeline(root, *paths):
    modules = [{"idx": i, "path": path, "type": "x"} for i, path in enumerate(("", *paths))]
    (root / "modules.json").write_text(json.dumps(modules))
    for path in paths:
        (root / path).mkdir(parents=True, exist_ok=True)
        (root / path / "config.json").write_text("{}")
    return root


def test_the_pipeline_is_copied(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    copy_companions(str(_pipeline(source, "1_Pooling", "2_Normalize")), out)
    copied = {p.relative_to(out).as_posix() for p in out.rglob("*.json")}
    assert copied == {"modules.json", "1_Pooling/config.json", "2_Normalize/config.json"}


def test_a_pipeline_with_weights_of_its_own_is_left_out(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    _pipeline(source, "1_Pooling", "2_Dense")
    (source / "2_Dense" / "model.safetensors").write_bytes(b"x")
    copy_companions(str(source), out)
    assert list(out.iterdir()) == []


def test_a_pipeline_that_points_outside_its_folder_is_left_out(tmp_path):
    source, out = tmp_path / "a" / "source", tmp_path / "out"
    source.mkdir(parents=True)
    out.mkdir()
    copy_companions(str(_pipeline(source, "../secret")), out)
    assert list(out.iterdir()) == []


def test_a_hub_id_gives_nothing(tmp_path):
    copy_companions("sentence-transformers/all-MiniLM-L6-v2", tmp_path)
    assert list(tmp_path.iterdir()) == []
