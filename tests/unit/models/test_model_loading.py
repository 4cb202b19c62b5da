import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers.utils import logging as hf_logging

from autocompress.core.errors import ModelError
from autocompress.models import describe, load_base_model, load_config, load_processor, model_digest
from autocompress.testing.tiny_models import (
    FAMILIES,
    auto_class_of,
    save_tiny,
    tiny_batches,
    tiny_model,
)

CAUSAL = "AutoModelForCausalLM"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a saved tiny Llama that a test may damage."""
    return shutil.copytree(saved("llama"), tmp_path / "llama")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_every_family_loads_as_it_was_saved(family, saved, model):
    base = load_base_model(str(saved(family)), auto_class_of(family))
    assert type(base.module) is type(model)
    assert not base.module.training
    assert not any(p.requires_grad for p in base.module.parameters())
    assert base.layout == describe(model)
    assert base.digest == model_digest(model)
    assert base.source == str(saved(family))
    batch = tiny_batches(family)[0]
    with torch.no_grad():
        found, expected = base.module(**batch)[0], model(**batch)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"vit"}))
def test_the_tokenizer_of_every_family_survives_saving(family, saved):
    processor = load_processor(str(saved(family)))
    text = 'for "x" in naïve:\n    print(1)'
    ids = processor(text)["input_ids"]
    assert ids[0] == processor.bos_token_id == 1
    assert processor.decode(ids, skip_special_tokens=True) == text


def test_a_vision_model_comes_with_its_image_processor(saved):
    processor = load_processor(str(saved("vit")))
    images = [np.zeros((8, 8, 3), dtype=np.uint8)] * 2
    assert processor(images, return_tensors="pt")["pixel_values"].shape == (2, 3, 8, 8)


def test_a_folder_without_a_tokenizer_has_no_processor(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert load_base_model(str(folder), CAUSAL).processor is None


def test_rotary_frequencies_keep_float32_when_loaded_in_half_precision(saved):
    module = load_base_model(str(saved("llama")), CAUSAL, dtype="bfloat16").module
    assert module.lm_head.weight.dtype == torch.bfloat16
    assert module.model.rotary_emb.inv_freq.dtype == torch.float32


def test_dtype_auto_is_the_checkpoints(tmp_path):
    path = save_tiny("llama", tmp_path / "half", model=tiny_model("llama").to(torch.bfloat16))
    assert load_base_model(str(path), CAUSAL).layout.layers[0].dtype == "bfloat16"


def test_the_digest_tells_weights_apart(saved, folder):
    first = load_base_model(str(saved("llama")), CAUSAL).digest
    assert load_base_model(str(folder), CAUSAL).digest == first
    other = tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    assert model_digest(other) != first
    edit_config(folder, rms_norm_eps=1e-3)
    assert load_base_model(str(folder), CAUSAL).digest != first


@pytest.mark.slow
def test_the_digest_is_the_same_in_another_process(saved):
    code = (
        "import sys; from autocompress.models import load_base_model; "
        f"sys.stdout.write(load_base_model(sys.argv[1], {CAUSAL!r}).digest)"
    )
    path = str(saved("llama"))
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True)
    assert run.stdout.decode() == load_base_model(path, CAUSAL).digest


def test_loading_is_silent_and_restores_the_users_logging(saved, capfd):
    hf_logging.enable_progress_bar()
    verbosity = hf_logging.get_verbosity()
    load_base_model(str(saved("bert")), "AutoModel")
    assert capfd.readouterr() == ("", "")
    assert hf_logging.get_verbosity() == verbosity
    assert hf_logging.is_progress_bar_enabled()


def test_an_encoder_without_a_trained_pooler_is_loaded_without_one(saved):
    base = load_base_model(str(saved("bert")), "AutoModel")
    assert base.module.pooler is None
    with_pooler = load_base_model(str(saved("bert-encoder")), "AutoModel")
    assert with_pooler.layout.layer("pooler.dense").role == "other"


@pytest.mark.parametrize(
    ("family", "auto_class", "message"),
    [
        ("bart", CAUSAL, r"'causal-lm'.*is 'BartForConditionalGeneration'. Use --task seq2seq-lm"),
        ("bert", CAUSAL, r"is 'BertForMaskedLM'. Use --task masked-lm"),
        ("t5", "AutoModelForMaskedLM", r"is 't5'. Use --task seq2seq-lm"),
        ("llama", "AutoModelForSeq2SeqLM", r"is 'llama'. Use --task causal-lm"),
        ("vit", CAUSAL, r"is 'vit'. Use --task image-classification"),
        ("bert", "AutoModelForSequenceClassification", r"Use --task masked-lm"),
        (
            "bert-encoder",
            "AutoModelForMaskedLM",
            r"no weights for 6 tensors of BertForMaskedLM, e\.g\. 'cls\.predictions\.bias'.*random"
            r".*Use --task feature-extraction",
        ),
        (
            "bert-encoder",
            "AutoModelForSequenceClassification",
            r"no weights for 2 tensors.*Use --task feature-extraction",
        ),
    ],
)
def test_the_wrong_task_for_a_model_is_refused_with_the_right_one(
    saved, family, auto_class, message
):
    with pytest.raises(ModelError, match=message):
        load_base_model(str(saved(family)), auto_class)


def test_a_path_that_does_not_exist_is_answered_with_its_neighbours(folder):
    with pytest.raises(ModelError, match=r"does not exist.*Did you mean 'llama'"):
        load_base_model(str(folder.parent / "lama"), CAUSAL)
    with pytest.raises(ModelError, match=r"does not exist.*Did you mean 'llama'"):
        load_base_model(str(folder.parent / "lama" / "deeper"), CAUSAL)


def test_a_hub_name_without_a_network_says_what_to_do():
    with pytest.raises(ModelError, match=r"neither a folder nor a model that the hub gives us"):
        load_config("no-such-owner/no-such-model")


def test_a_file_instead_of_a_folder_is_answered_with_its_folder(folder):
    with pytest.raises(ModelError, match=r"is a file. Give its folder: '.*llama'"):
        load_base_model(str(folder / "model.safetensors"), CAUSAL)


def test_a_gguf_file_is_answered_with_the_way_to_dequantize_it(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    for source in (path, tmp_path):
        with pytest.raises(ModelError, match=r"Dequantize it once: .*dequantize_gguf\('.*gguf'"):
            load_base_model(str(source), CAUSAL)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, r"model\.safetensors is empty \(0 bytes\)"),
        (4, r"model\.safetensors is truncated within its header"),
        (200, r"model\.safetensors is truncated within its header"),
        (-1, r"model\.safetensors has \d+ bytes where its header says \d+"),
    ],
)
def test_a_damaged_weights_file_is_named(folder, keep, message):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=rf"checkpoint is damaged: .*{message}"):
        load_base_model(str(folder), CAUSAL)


def test_garbage_in_a_weights_file_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"not json")
    with pytest.raises(ModelError, match="has a header that cannot be read"):
        load_base_model(str(folder), CAUSAL)


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00001\.safetensors is missing"):
        load_base_model(str(folder), CAUSAL)


def test_a_damaged_index_is_named(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"index\.json must map weight names to files"):
        load_base_model(str(folder), CAUSAL)


def test_a_folder_without_weights_says_what_to_do(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no weights.*save_pretrained"):
        load_base_model(str(folder), CAUSAL)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"pickle files, which can run code.*are not read"):
        load_base_model(str(folder), CAUSAL)


def test_a_folder_without_config_says_what_it_holds(folder):
    (folder / "config.json").unlink()
    for load in (load_config, load_processor, lambda s: load_base_model(s, CAUSAL)):
        with pytest.raises(ModelError, match=r"must hold config\.json, but .* holds .*tokenizer"):
            load(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "lllama"}', "{}"])
def test_a_config_that_cannot_be_read_is_one_clear_error(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="its config cannot be read"):
        load_base_model(str(folder), CAUSAL)


def test_weights_of_another_shape_than_the_config_says_are_named(folder):
    edit_config(folder, intermediate_size=80)
    message = r"6 tensors of .* differ, e\.g\. 'model\.layers\.0\.mlp\.down_proj\.weight'"
    with pytest.raises(ModelError, match=message):
        load_base_model(str(folder), CAUSAL)


def test_missing_blocks_are_refused(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"no weights for 9 tensors.*model\.layers\.2"):
        load_base_model(str(folder), CAUSAL)


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
        model.model.norm.weight[1] = float("-inf")
    path = save_tiny("llama", tmp_path / "nan", model=model)
    with pytest.raises(ModelError, match=r"NaN or infinite.*model\.norm\.weight, lm_head\.weight"):
        load_base_model(str(path), CAUSAL)


def test_a_quantized_model_is_no_base_model(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"must be uncompressed, but .* is quantized with 'gptq'"):
        load_base_model(str(folder), CAUSAL)


def test_a_damaged_tokenizer_is_one_clear_error(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer or image processor cannot be loaded"):
        load_base_model(str(folder), CAUSAL)


def test_code_in_a_checkpoint_does_not_run_unless_asked(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_base_model(str(folder), CAUSAL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat"}, r"Unknown dtype 'bfloat'. Did you mean 'bfloat16'"),
        ({"device": "cuda:99"}, r"Device 'cuda:99' cannot be used here.*--device cpu"),
        ({"auto_class": "AutoModelForCasualLM"}, r"Did you mean 'AutoModelForCausalLM'"),
    ],
)
def test_a_wrong_option_is_refused_by_name(saved, options, message):
    with pytest.raises(ModelError, match=message):
        load_base_model(str(saved("llama")), **{"auto_class": CAUSAL, **options})
