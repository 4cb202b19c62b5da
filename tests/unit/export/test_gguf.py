"""GGUF files of tiny models: what transformers computes with them is what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from autocompress.core import Scheme
from autocompress.core.errors import CheckpointError, UsageError
from autocompress.export.exporter import EXPORTERS
from autocompress.export.gguf import GGUF_FILE, Gguf, GgufNearest
from autocompress.export.manifest import Manifest
from autocompress.export.verify import run_fresh_process
from autocompress.methods import CompressedWeight, LayerStatistics, compress
from autocompress.models import BaseModel, weight_matrix
from autocompress.models.quiet import quiet_transformers

from .conftest import Compressed, compress_all, expected_outputs, outputs

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

SCHEMES = (
    "rtn(bits=4,group_size=32)",
    "rtn(bits=8,group_size=32)",
    "rtn(bits=5,group_size=64)",
    "mxfp4",
    "rtn(bits=3,group_size=0)",
    "magnitude(sparsity=0.5)+rtn(bits=4,group_size=32)",
    "ternary(group_size=32)",
    "cast(dtype=float16)",
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")

MODULE = """
from pathlib import Path
import torch
from autocompress.export.gguf import Gguf
from autocompress.testing.tiny_models import tiny_batches

def answer(request):
    model = Gguf().load(Path(request["path"]), dtype="float32", device="cpu")
    batch = tiny_batches(request["family"], n_batches=1, batch_size=2, length=16)[0]
    with torch.no_grad():
        return {"logits": model(**batch).logits.tolist()}
"""

MakeBase = Callable[..., BaseModel]


def gguf_weights(base: BaseModel) -> dict[str, CompressedWeight]:
    """Every layer compressed so that GGUF holds it, but for the last, which stays as it is."""
    weights = compress_all(base, SCHEMES)
    weights.popitem()
    return weights


def written(base: BaseModel, weights: Compressed, out: Path) -> Manifest:
    return Gguf().write(base, weights, out, claim={})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reload_computes_what_was_measured(
    family: str, make_base: MakeBase, tmp_path: Path
) -> None:
    base = make_base(family)
    weights = gguf_weights(base)
    manifest = written(base, weights, tmp_path / "out")

    model = Gguf().load(tmp_path / "out", dtype=None, device="cpu")

    for name, weight in weights.items():
        found = weight_matrix(model, base.layout.layer(name))
        assert torch.equal(found, weight.to_dense()), (name, str(weight.scheme))
    difference = (outputs(model, family) - expected_outputs(base, weights, family)).abs().max()
    assert difference <= 1e-5
    assert manifest.checkpoint_format == "gguf"
    assert Manifest.read(tmp_path / "out") == manifest


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_file_alone_describes_the_model(
    family: str, make_base: MakeBase, tmp_path: Path
) -> None:
    base = make_base(family)
    weights = gguf_weights(base)
    written(base, weights, tmp_path / "out")
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "out" / GGUF_FILE).rename(alone / GGUF_FILE)
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(alone, gguf_file=GGUF_FILE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(alone, gguf_file=GGUF_FILE)

    difference = outputs(model, family) - expected_outputs(base, weights, family)
    assert difference.abs().max() <= 1e-5
    text = "A model, a task and a budget in; 3 numbers out: 1.5, 20 and 300!\n"
    assert tokenizer(text)["input_ids"] == base.processor(text)["input_ids"]


def test_a_fresh_process_loads_it(
    make_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "measure_gguf.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    base = make_base("gemma3")
    weights = gguf_weights(base)
    written(base, weights, tmp_path / "out")
    request = {"path": str(tmp_path / "out"), "family": "gemma3"}
    answer = run_fresh_process("measure_gguf", request, timeout_seconds=100)
    found = torch.tensor(answer["logits"])
    assert (found - expected_outputs(base, weights, "gemma3")).abs().max() <= 1e-4


def test_bfloat16_models_keep_their_dtype(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama", "bfloat16")
    name = "model.layers.0.mlp.up_proj"
    weights = {name: compress_all(base, SCHEMES)[name]}
    written(base, weights, tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / GGUF_FILE)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == "BF16"
    assert types["blk.0.attn_norm.weight"] == "F32"
    model: Any = Gguf().load(tmp_path / "out", dtype=None, device="cpu")
    assert model.dtype == torch.bfloat16
    assert torch.equal(outputs(model, "llama"), expected_outputs(base, weights, "llama"))


def test_a_tied_head_is_left_out_and_the_embedding_may_be_quantized(
    make_base: MakeBase, tmp_path: Path
) -> None:
    base = make_base("qwen2")
    written(base, compress_all(base, ("rtn(bits=8,group_size=32)",)), tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / GGUF_FILE)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in types


def test_settings_of_generation_lie_beside_the_file(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama")
    manifest = written(base, {}, tmp_path / "out")
    assert "generation_config.json" in manifest.files
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == base.module.generation_config.eos_token_id


def test_the_manifest_states_the_bytes_of_the_file(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("gpt2")
    weights = compress_all(base, ("rtn(bits=2,group_size=32)",))
    manifest = written(base, weights, tmp_path / "out")
    assert manifest.storage_bytes == Gguf().stored_bytes(tmp_path / "out")
    assert manifest.storage_bytes < (tmp_path / "out" / GGUF_FILE).stat().st_size
    layers = sum(layer.n_weights for layer in base.layout.layers) * 4.5 / 8
    others = sum(p.numel() for p in base.module.parameters()) - sum(
        layer.n_weights for layer in base.layout.layers
    )
    assert manifest.storage_bytes == layers + 4 * others
    note = manifest.notes["transformer.h.0.attn.c_attn"][-1]
    assert note == "stored as Q4_0 (4.5 bits per weight), code by code"


def test_llama_3_frequencies_become_divisors(make_base: MakeBase, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    }  # fmt: skip
    base = make_base("llama")
    config = transformers.LlamaConfig(**{**base.module.config.to_dict(), "rope_parameters": rope})
    module = transformers.LlamaForCausalLM(config).eval()
    scaled = replace(base, module=module)
    written(scaled, {}, tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / GGUF_FILE)
    (divisors,) = (t.data for t in reader.tensors if t.name == "rope_freqs.weight")
    plain = 5e5 ** (-torch.arange(0, 16, 2) / 16)
    frequencies = plain / torch.from_numpy(divisors.copy())
    torch.testing.assert_close(frequencies, module.model.rotary_emb.inv_freq)
    assert divisors[0] == 1
    assert divisors[-1] == 8
    model = Gguf().load(tmp_path / "out", dtype=None, device="cpu")
    assert (outputs(model, "llama") - outputs(module, "llama")).abs().max() <= 1e-5


def metadata(base: BaseModel, path: Path) -> dict[str, Any]:
    written(base, {}, path)
    fields = gguf.GGUFReader(path / GGUF_FILE).fields
    return {name.partition(".")[2]: field.contents() for name, field in fields.items()}


def test_metadata_of_a_model_with_local_attention(make_base: MakeBase, tmp_path: Path) -> None:
    found = metadata(make_base("gemma3"), tmp_path / "out")
    assert found["architecture"] == "gemma3"
    assert found["attention.sliding_window"] == 16
    assert found["attention.sliding_window_pattern"] == [True, False]
    assert (found["rope.freq_base"], found["rope.freq_base_swa"]) == (1e6, 1e4)
    assert found["attention.key_length"] == 16
    assert found["attention.head_count_kv"] == 2


def test_the_context_ends_where_a_window_would_begin_to_matter(
    make_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("mistral")
    assert metadata(base, tmp_path / "whole")["context_length"] == 256
    monkeypatch.setattr(base.module.config, "sliding_window", 64)
    assert metadata(base, tmp_path / "window")["context_length"] == 64


def test_schemes_without_a_block_type_are_refused_and_can_be_quantized_again(
    make_base: MakeBase, tmp_path: Path
) -> None:
    base = make_base("llama")
    name = "model.layers.1.mlp.down_proj"
    matrix = weight_matrix(base.module, base.layout.layer(name))
    scheme = Scheme.parse("svd(rank=20)+rtn(bits=5,group_size=16)")
    weights = {name: compress(matrix, scheme, LayerStatistics.none())}
    with pytest.raises(UsageError, match=r"gguf cannot hold layer .*down_proj: .*factorization"):
        written(base, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    manifest = GgufNearest().write(base, weights, tmp_path / "out", claim={})
    assert manifest.notes[name][-1].startswith("quantized again, to Q5_0 (5.5 bits per weight)")
    model = Gguf().load(tmp_path / "out", dtype=None, device="cpu")
    found = weight_matrix(model, base.layout.layer(name))
    error = (found - weights[name].to_dense()).norm() / weights[name].to_dense().norm()
    assert 0 < error < 0.06


def test_models_without_a_form_in_gguf_are_refused(make_base: MakeBase) -> None:
    exporter, llama = Gguf(), make_base("llama")
    assert exporter.refusal_of_model(llama) == ""
    assert "causal language models" in exporter.refusal_of_model(make_base("bert"))
    assert "fast one" in exporter.refusal_of_model(replace(llama, processor=None))


@pytest.mark.parametrize(
    ("family", "setting", "reason"),
    [
        ("llama", {"hidden_act": "relu"}, "with activation silu, but got relu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "full_attention are 'yarn'"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3"}}, "full_attention are 'llama3'"),
        ("qwen3", {"attention_bias": True}, "with attention_bias False, but got True"),
        ("gemma3", {"query_pre_attn_scalar": 7}, "with query_pre_attn_scalar 16, but got 7"),
        ("gpt2", {"scale_attn_weights": False}, "with scale_attn_weights True, but got False"),
        ("llama", {"model_type": "llamma"}, "but got 'llamma'. Did you mean 'llama'?"),
    ],
)
def test_settings_that_llama_cpp_does_not_compute_are_refused(
    family: str,
    setting: dict[str, Any],
    reason: str,
    make_base: MakeBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_base(family)
    for name, value in setting.items():
        monkeypatch.setattr(base.module.config, name, value)
    assert reason in Gguf().refusal_of_model(base)


def test_a_damaged_file_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    written(make_base("llama"), {}, tmp_path / "out")
    with (tmp_path / "out" / GGUF_FILE).open("r+b") as stream:
        stream.seek(-9, 2)
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="damaged or was edited"):
        Gguf().load(tmp_path / "out", dtype=None, device="cpu")


def test_both_names_are_registered() -> None:
    assert {"gguf", "gguf-nearest"} <= set(EXPORTERS)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_llama_cpp_agrees(
    family: str, make_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_amx() -> Any:  # its kernels crash on some CPUs (llama.cpp issue 20824)
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_amx)
    base = make_base(family)
    weights = gguf_weights(base)
    written(base, weights, tmp_path / "out")
    tokens = [1, *range(40, 71)]
    model = llama_cpp.Llama(
        str(tmp_path / "out" / GGUF_FILE), n_ctx=64, logits_all=True, verbose=False
    )
    model.eval(tokens)
    found = torch.tensor(model.scores[: len(tokens)])
    reloaded: Any = Gguf().load(tmp_path / "out", dtype=None, device="cpu")
    with torch.no_grad():
        expected = reloaded(torch.tensor([tokens])).logits[0]
    assert (found - expected).norm() / expected.norm() < 0.05
