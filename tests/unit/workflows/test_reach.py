"""What calibration tokens reach: which layers share an input, and which are not searched."""

from pathlib import Path

import pytest
import transformers as hf

from autocompress.core.errors import SpaceError
from autocompress.models import describe
from autocompress.native.build import missing
from autocompress.spaces import load_space
from autocompress.testing.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from autocompress.workflows.reach import few_tokens, slow_methods
from autocompress.workflows.session import open_session
from autocompress.workflows.settings import SearchSettings

SMALL = {
    "task": "causal-lm", "calibration_tokens": 128, "search_tokens": 64, "report_tokens": 64,
    "sequence_length": 32,
}  # fmt: skip
VISION = "model.vision_tower."


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


@pytest.fixture(scope="module")
def sees(tmp_path_factory):
    """A model that reads texts and images."""
    both = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    text = {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320,
        "query_pre_attn_scalar": 16, "layer_types": ["full_attention"],
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    image = {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    config = hf.Gemma3Config(
        text_config=both | text, vision_config=both | image, mm_tokens_per_image=4,
        image_token_index=300, boi_token_index=301, eoi_token_index=302,
    )  # fmt: skip
    model = hf.Gemma3ForConditionalGeneration(config)
    return saved(model, tmp_path_factory.mktemp("gemma"))


def session_of(model, cache, **settings):
    return open_session(SearchSettings(model=str(model), **(SMALL | settings)), cache)


def test_a_session_knows_what_its_layers_read(rwkv, tmp_path):
    layout = session_of(rwkv, tmp_path).base.layout
    value = layout.layer("rwkv.blocks.0.attention.value")
    assert value.input_name == value.name
    assert session_of(rwkv, tmp_path).base.layout == layout


def test_layers_that_no_token_reaches_are_left_as_they_are(sees, tmp_path, caplog):
    space = session_of(sees, tmp_path, space="mixed_precision").space
    assert space.searched_layers
    assert not any(name.startswith(VISION) for name in space.searched_layers)
    [line] = [r.getMessage() for r in caplog.records if "Left as they are" in r.getMessage()]
    assert "10 of 18 layers of the space mixed_precision (model.vision_tower.*)" in line
    assert "--task and --data" in line


@pytest.mark.parametrize("sampler", ["guided", "tpe"])
def test_every_session_resolves_the_same_space(sees, tmp_path, sampler):
    settings = {"space": "mixed_precision", "sampler": sampler, "token_weighting": "none"}
    first = session_of(sees, tmp_path / "cache", **settings).space
    assert session_of(sees, tmp_path / "cache", **settings).space.digest == first.digest
    assert session_of(sees, tmp_path / "other", **settings).space.digest == first.digest


def test_a_space_for_such_layers_alone_is_refused(sees, tmp_path):
    path = Path(tmp_path / "images.yaml")
    path.write_text(
        "schema_version: 1\nname: images\ndescription: A test.\nchoices:\n"
        "  - layers: ['model.vision_tower.*']\n    roles: [up]\n"
        "    options: [base, {quantize: [{method: rtn, bits: 4}]}]\n"
    )
    with pytest.raises(SpaceError, match=r"'images' nothing is left.*Next step: another --space"):
        _ = session_of(sees, tmp_path, space=str(path)).space


def test_an_expert_without_tokens_stays_in_the_space(tmp_path, caplog):
    model = save_tiny("mixtral", tmp_path / "mixtral")
    settings = {"space": "mixed_precision", "calibration_tokens": 8, "sequence_length": 8}
    session = session_of(model, tmp_path, **settings)
    experts = {x.name for x in session.base.layout.layers if x.expert is not None}
    assert experts & session.unread
    assert experts <= set(session.space.searched_layers)
    assert "Left as they are" not in caplog.text


def test_a_pooler_runs_and_is_searched_though_the_task_does_not_ask_for_it(tmp_path):
    model = save_tiny("bert-encoder", tmp_path / "bert")
    settings = {"task": "feature-extraction", "space": "mixed_precision"}
    assert "pooler.dense" in session_of(model, tmp_path, **settings).space.searched_layers


@pytest.mark.parametrize(("tokens", "said"), [(128, "--calibration-tokens 384"), (1024, "")])
def test_few_tokens_for_wide_layers_are_worth_a_line(tmp_path, tokens, said):
    model = save_tiny("llama", tmp_path / "model")  # its widest layer has 96 inputs
    session = session_of(model, tmp_path / "cache", calibration_tokens=tokens)
    assert few_tokens(session).endswith(said)
    assert bool(few_tokens(session)) == bool(said)


def test_a_space_that_wants_a_compiler_says_so_where_there_is_none(tmp_path, monkeypatch):
    space = session_of(save_tiny("llama", tmp_path / "model"), tmp_path, space="trellis").space
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "there is no C compiler (no-such-compiler)" in slow_methods(space)
    bits = load_space("mixed_precision", describe(tiny_model("llama")).layers)
    assert slow_methods(bits) == ""
    monkeypatch.delenv("CC")
    assert bool(slow_methods(space)) == bool(missing())
