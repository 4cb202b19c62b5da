"""What calibration tokens reach: which layers share an input."""

import pytest
import transformers as hf

from autocompress.testing.tiny_models import tiny_tokenizer
from autocompress.workflows.session import open_session
from autocompress.workflows.settings import SearchSettings

SMALL = {
    "calibration_tokens": 128, "search_tokens": 64, "report_tokens": 64, "sequence_length": 32,
}  # fmt: skip


def saved(model, path):
    model.save_pretrained(path)
    tiny_tokenizer("llama").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def rwkv(tmp_path_factory):
    config = hf.RwkvConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32
    )
    return saved(hf.RwkvForCausalLM(config), tmp_path_factory.mktemp("rwkv"))


def test_a_session_knows_what_its_layers_read(rwkv, tmp_path):
    session = open_session(SearchSettings(model=rwkv, **SMALL), tmp_path)
    value = session.base.layout.layer("rwkv.blocks.0.attention.value")
    assert value.input_name == value.name
    again = open_session(SearchSettings(model=rwkv, **SMALL), tmp_path)
    assert again.base.layout == session.base.layout
