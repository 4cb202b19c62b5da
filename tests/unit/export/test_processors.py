"""What AutoProcessor reads goes along with every format that is a transformers folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers as hf

from autocompress.export.companions import copy_processor_files
from autocompress.export.formats import EXPORTERS
from autocompress.models.quiet import quiet_transformers
from autocompress.testing.tiny_models import tiny_tokenizer

FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@pytest.fixture
def seeing(tmp_path):
    """The files of a model that reads text and images."""
    tokenizer = tiny_tokenizer("llama")
    tokenizer.image_token = "<img>"
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16})
    with quiet_transformers():
        hf.LlavaProcessor(images, tokenizer, patch_size=8, chat_template="{{ 1 }}").save_pretrained(
            tmp_path / "seeing"
        )
    return tmp_path / "seeing"


@pytest.mark.parametrize("from_hub", [False, True], ids=["folder", "hub"])
@pytest.mark.parametrize("name", ["packed", "dense", "compressed-tensors"])
def test_an_export_of_a_model_that_sees_keeps_its_processor(
    name, from_hub, make_base, seeing, tmp_path, hub_cache
):
    base = make_base("llama")
    source = hub_cache(seeing) if from_hub else str(seeing)
    manifest = EXPORTERS[name].write(replace(base, source=source), {}, tmp_path / "out", claim={})
    assert {"processor_config.json", "chat_template.jinja"} <= set(manifest.files)
    with quiet_transformers():
        processor = hf.AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, hf.LlavaProcessor)
    assert processor.image_processor.size["shortest_edge"] == 16
    assert processor.chat_template == "{{ 1 }}"


def test_what_is_written_already_is_left_alone(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for folder, text in ((source, "of the base"), (out, "written")):
        folder.mkdir()
        for name in FILES if folder is source else FILES[:1]:
            (folder / name).write_text(text)
    copy_processor_files(str(source), out)
    found = {path.name: path.read_text() for path in out.iterdir()}
    assert found == dict.fromkeys(FILES, "of the base") | {FILES[0]: "written"}


def test_a_model_that_does_not_see_gets_nothing(tmp_path, hub_cache):
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    copy_processor_files(str(tmp_path / "source"), tmp_path / "out")
    copy_processor_files(hub_cache(tmp_path / "source"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
