import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from autocompress.core.errors import CheckpointError, UsageError
from autocompress.export import Manifest, load, write_packed
from autocompress.export.formats import EXPORTERS
from autocompress.export.manifest import MANIFEST_FILE, file_record
from autocompress.export.tensor_file import read_header
from autocompress.kernels import dispatch
from autocompress.models import BaseModel
from autocompress.models.quiet import quiet_transformers

from .conftest import compress_all, from_pretrained, outputs

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(base: BaseModel, weights: dict, tmp_path: Path) -> Path:
    write_packed(base, weights, tmp_path / "out", claim={})
    return tmp_path / "out"


def edit_config(checkpoint: Path, edit: Callable[[dict], None]) -> None:
    """Change config.json as an attacker would: with a manifest that agrees."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    bless(checkpoint, "config.json")


def bless(checkpoint: Path, name: str) -> None:
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    record = file_record(checkpoint / name)
    manifest["files"][name] = {"bytes": record.bytes, "sha256": record.sha256}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))


def test_a_model_loads_in_another_dtype(checkpoint: Path) -> None:
    loaded = load(checkpoint, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert outputs(loaded, "qwen2").dtype == torch.bfloat16
    scales = {b.dtype for n, b in loaded.named_buffers() if n.endswith("scales")}
    assert scales == {torch.float16}


def test_kernels_are_used_only_where_asked_for_and_agree_within_rounding(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(checkpoint / "cache"))
    monkeypatch.setattr(dispatch, "seconds_of", lambda *_: 1.0)
    reference = outputs(load(checkpoint), "qwen2")
    assert not (checkpoint / "cache").exists()
    monkeypatch.setenv("AUTOCOMPRESS_KERNELS", "auto")
    assert torch.equal(outputs(load(checkpoint, kernels="reference"), "qwen2"), reference)
    measured = EXPORTERS["packed"].load(checkpoint, dtype=None, device="cpu")
    assert torch.equal(outputs(measured, "qwen2"), reference)
    fast = outputs(load(checkpoint), "qwen2")
    assert (checkpoint / "cache" / "kernels").is_dir()
    assert not torch.equal(fast, reference)
    assert float((fast - reference).abs().max()) < 0.05 * float(reference.abs().max())


def test_unknown_kernels_are_refused_before_anything_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="Unknown kernels 'fast'"):
        load(checkpoint, kernels="fast")
    monkeypatch.setenv("AUTOCOMPRESS_KERNELS", "autO")
    with pytest.raises(UsageError, match="Did you mean 'auto'"):
        load(checkpoint)


def test_resident_weights_are_the_packed_bytes_and_nothing_dense(
    checkpoint: Path, base: BaseModel
) -> None:
    loaded = load(checkpoint)
    persistent = loaded.state_dict()
    resident = sum(t.numel() * t.element_size() for t in persistent.values())
    assert resident == Manifest.read(checkpoint).storage_bytes
    assert not any(layer.name + ".weight" in persistent for layer in base.layout.layers)


def test_the_body_loads_without_its_head_and_back(checkpoint: Path, tmp_path: Path) -> None:
    body = load(checkpoint, auto_class="AutoModel")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        hidden = body(input_ids=ids).last_hidden_state
        logits = load(checkpoint)(input_ids=ids).logits
    with quiet_transformers():
        body.save_pretrained(tmp_path / "body")
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    with torch.no_grad():
        assert torch.equal(whole.model(input_ids=ids).last_hidden_state, hidden)
        # The embedding alone was saved: the tied head is not in the body's checkpoint.
        assert logits.shape[-1] == body.config.vocab_size


def test_a_checkpoint_whose_layers_fit_no_module_is_refused(checkpoint: Path) -> None:
    def edit(config: dict) -> None:
        layers = config["quantization_config"]["layers"]
        layers["model.norm"] = layers.pop("model.layers.0.self_attn.q_proj")

    edit_config(checkpoint, edit)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\."):
        load(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scheme", "rtn(bits=9)", "bits must be 2 to 8"),
        ("scheme", "os.system(cmd=1)", "Unknown .*method 'os.system'"),
        ("scheme", "rtn(bits=2", "A stage is written"),
        ("shape", [64, -64], "not valid at layers"),
        ("shape", [1 << 40, 64], "not valid at layers"),
        ("shape", [128, 64], "its scheme"),
        ("dtype", "complex64", "not valid at layers"),
        ("kind", "convolution", "not valid at layers"),
        ("aliases", ["../x"], "not valid at layers"),
        ("aliases", ["model.layers.1.self_attn.q_proj"], "names .* twice"),
        ("code", "print()", "not valid at layers"),
    ],
)
def test_a_tampered_layer_entry_is_refused_by_both_ways_to_load(
    checkpoint: Path, base: BaseModel, key: str, value: object, message: str
) -> None:
    def edit(config: dict) -> None:
        layers = config["quantization_config"]["layers"]
        layers["model.layers.0.self_attn.q_proj"][key] = value

    edit_config(checkpoint, edit)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(base, checkpoint)


def test_a_config_that_makes_other_shapes_is_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config.update(intermediate_size=48))
    with pytest.raises(CheckpointError, match=r"down_proj .*\(64, 96\).*makes it \(64, 48\)"):
        load(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 3},
        {"vocab_size": 10**12},
        {"hidden_act": "os.system"},
        {"model_type": "bert"},
        {"model_type": ["a"]},
        {"dtype": "float4096"},
        {"rope_parameters": {"rope_type": "surprise"}},
        {"layer_types": ["sideways", "full_attention"]},
        {"tie_word_embeddings": "maybe"},
        {"architectures": 5},
        {"quantization_config": 5},
        {"quantization_config": {}},
        {"quantization_config": None},
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_one_clear_error_or_makes_no_difference(
    checkpoint: Path, change: dict
) -> None:
    intact = outputs(load(checkpoint), "qwen2")
    edit_config(checkpoint, lambda config: config.update(change))
    try:
        loaded = load(checkpoint)
    except CheckpointError:
        return
    assert torch.equal(outputs(loaded, "qwen2"), intact)


def test_a_newer_format_version_is_named_as_such(checkpoint: Path, base: BaseModel) -> None:
    edit_config(checkpoint, lambda config: config["quantization_config"].update(version=2))
    with pytest.raises(CheckpointError, match=r"version 2, but this autocompress reads up to 1"):
        from_pretrained(base, checkpoint)


def test_code_that_a_config_names_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(
        checkpoint,
        lambda config: config.update(
            auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, model_type="evil"
        ),
    )
    with pytest.raises(CheckpointError):
        load(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_place_of_the_weights_is_never_opened(
    checkpoint: Path, base: BaseModel
) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(checkpoint)
    with pytest.raises(CheckpointError, match="safetensors files, but got"):
        from_pretrained(base, checkpoint)


def test_a_missing_tensor_is_named_even_when_transformers_loads_alone(
    checkpoint: Path, base: BaseModel
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / WEIGHTS)
    gone = next(name for name in tensors if name.endswith("scales"))
    del tensors[gone]
    save_file(tensors, checkpoint / WEIGHTS, {"format": "pt"})
    for loader in (load, lambda path: from_pretrained(base, path)):
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: tensor {gone} is missing"):
            loader(checkpoint)
        bless(checkpoint, WEIGHTS)


def test_a_tensor_that_the_model_lacks_is_an_error(
    make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base("llama")
    write_packed(base, compress_all(base), tmp_path / "out", claim={})
    edit_config(tmp_path / "out", lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=r"unexpected keys model\.layers\.1\."):
        load(tmp_path / "out")


def test_an_unknown_auto_class_is_the_callers_error_or_the_manifests(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'AutoModelForCausalLM'"):
        load(checkpoint, auto_class="AutoModelForCasualLM")
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest | {"auto_class": "AutoModelForX"}))
    with pytest.raises(CheckpointError, match="names a class that is not there"):
        load(checkpoint)


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds autocompress\.json, but .* does not"):
        load(tmp_path)


def test_headers_of_a_checkpoint_are_those_of_the_safetensors_library(checkpoint: Path) -> None:
    from safetensors import safe_open

    entries = read_header(checkpoint / WEIGHTS)
    with safe_open(checkpoint / WEIGHTS, "pt") as file:
        assert set(entries) == set(file.keys())
        for name, entry in entries.items():
            tensor = file.get_tensor(name)
            assert entry.shape == tuple(tensor.shape)
            assert f"torch.{entry.dtype}" == str(tensor.dtype)
