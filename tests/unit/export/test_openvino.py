"""OpenVINO exports of tiny models: what OpenVINO computes is what was measured."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autocompress.core.errors import CheckpointError, UsageError
from autocompress.export.manifest import Manifest
from autocompress.export.openvino import MODEL_FILE, WEIGHTS_FILE, OpenVino
from autocompress.export.verify import run_fresh_process
from autocompress.methods import decode
from autocompress.models import BaseModel, overridden
from autocompress.testing.tiny_models import tiny_batches

from .conftest import Compressed, compress_all, expected_outputs, outputs

openvino = pytest.importorskip("openvino")

SCHEMES = (
    "rtn(bits=4,group_size=32)",
    "rtn(bits=8,group_size=32)",
    "rtn(bits=3,group_size=16,symmetric=false)",
    "rtn(bits=6,group_size=0,symmetric=false)",
    "hqq(bits=4,group_size=32)",
    "svd(rank=9)",
    "ternary(group_size=32)",
    "magnitude(sparsity=0.5)+rtn(bits=4,group_size=32)",
    "svd(rank=8)+rtn(bits=4,group_size=8)",
    "cast(dtype=float16)",
    "magnitude(sparsity=0.5)",
    "hadamard+rtn(bits=4,group_size=32)",
    "hadamard(seed=3)+rtn(bits=8,group_size=0,symmetric=false)",
    "hadamard+svd(rank=8)+rtn(bits=4,group_size=8)",
)
PLAIN = "rtn(bits=4,group_size=32)"
EMBEDDING = "model.embed_tokens"

MODULE = """
from pathlib import Path
import torch
from autocompress.export.openvino import OpenVino
from autocompress.testing.tiny_models import tiny_batches

def answer(request):
    model = OpenVino().load(Path(request["path"]), dtype="float32", device="cpu")
    batch = tiny_batches(request["family"], n_batches=1, batch_size=2, length=16)[0]
    with torch.no_grad():
        return {"logits": model(**batch).logits.tolist()}
"""

MakeBase = Callable[..., BaseModel]
Written = tuple[BaseModel, Compressed, Path, Manifest]


@pytest.fixture(scope="module")
def gemma(make_base: MakeBase, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A Gemma 3 with tied embedding and head in 4 bits, and local attention over 16 tokens."""
    base = make_base("gemma3")
    weights = compress_all(base, SCHEMES)
    out = tmp_path_factory.mktemp("openvino") / "out"
    return base, weights, out, OpenVino().write(base, weights, out, claim={})


@pytest.fixture(scope="module")
def rotated(make_base: MakeBase, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The same with every layer in 4 bits of a rotated basis."""
    base = make_base("gemma3")
    weights = compress_all(base, (f"hadamard+{PLAIN}",))
    out = tmp_path_factory.mktemp("openvino") / "rotated"
    return base, weights, out, OpenVino().write(base, weights, out, claim={})


@pytest.fixture(scope="module")
def client(gemma: Written) -> Any:
    return OpenVino().load(gemma[2], dtype=None, device="cpu")


def test_logits_are_those_that_were_measured(gemma: Written, client: Any) -> None:
    base, weights, _, _ = gemma
    batch = tiny_batches("gemma3", n_batches=1, batch_size=3, length=40)[0]
    real = batch["attention_mask"] > 0
    assert not bool(real.all())
    dense = {name: weight.to_dense() for name, weight in weights.items()}
    with torch.no_grad(), overridden(base.module, base.layout, dense):
        expected = base.module(**batch).logits
    found = client(**batch).logits
    assert (found - expected)[real].abs().max() <= 1e-5


def test_decoding_step_by_step_goes_on_from_the_cache(client: Any) -> None:
    ids = tiny_batches("gemma3", n_batches=1, batch_size=2, length=24, padded=False)[0]["input_ids"]
    whole = client(ids).logits
    parts = [
        client(ids[:, :20]).logits,
        *(client.extend(ids[:, i : i + 1]).logits for i in (20, 21)),
    ]
    parts.append(client.extend(ids[:, 22:]).logits)
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5
    assert torch.equal(client(ids).logits, whole)


def read_by_plugin(path: Path) -> dict[str, Counter[str]]:
    """How often each kind of node of the compiled model reads each type."""
    from autocompress.export.openvino_client import EXACT

    settings = {**EXACT, "INFERENCE_NUM_THREADS": "1"}
    compiled = openvino.Core().compile_model(path / MODEL_FILE, "CPU", settings)
    read: dict[str, Counter[str]] = {}
    for node in compiled.get_runtime_model().get_ops():
        sources = (value.get_node().get_rt_info() for value in node.input_values())
        kind = node.get_rt_info()["layerType"].astype(str)
        read.setdefault(kind, Counter()).update(s["outputPrecisions"].astype(str) for s in sources)
    return read


def test_codes_stay_codes_in_the_compiled_model(gemma: Written) -> None:
    """The plugin's kernels read them: neither head nor embedding is decoded when it is compiled."""
    read = read_by_plugin(gemma[2])
    assert {"i4", "u4", "i8", "u8"} <= set(read["FullyConnected"])
    assert "i4" in read["Gather"]


def test_a_rotation_leaves_codes_as_they_are_and_is_made_once(
    rotated: Written, tmp_path: Path
) -> None:
    """Query, key and value share one, as gate and up do; no sign is converted at run time."""
    base, weights, out, _ = rotated
    plain = tmp_path / "plain"
    OpenVino().write(base, compress_all(base, (PLAIN,)), plain, claim={})
    before, after = read_by_plugin(plain), read_by_plugin(out)
    assert after["FullyConnected"]["i4"] == before["FullyConnected"]["i4"] == len(weights)
    assert after["Gather"]["i4"] == before["Gather"]["i4"] == 1
    assert "i8" not in {kind for read in after.values() for kind in read}
    n_rotations = 2 + 4 * base.module.config.num_hidden_layers  # of the tied matrix, two
    assert n_products(out) - n_products(plain) == 2 * n_rotations


def n_products(path: Path) -> int:
    graph = openvino.Core().read_model(path / MODEL_FILE)
    return sum(op.get_type_name() == "MatMul" for op in graph.get_ops())


def test_a_rotation_adds_a_byte_per_input_and_two_small_matrices_per_width(
    rotated: Written, tmp_path: Path
) -> None:
    base, weights, out, manifest = rotated
    plain = OpenVino().write(base, compress_all(base, (PLAIN,)), tmp_path / "plain", claim={})
    widths = {weight.shape[1] for weight in weights.values()}
    assert widths == {64, 96}
    distinct = 4 * (8 * 8 + 12 * 12)  # 64 = 8 x 8, 96 = 12 x 8
    shapes = manifest.storage_bytes - plain.storage_bytes - sum(widths) - distinct
    assert 0 < shapes < 200
    assert manifest.storage_bytes == (out / WEIGHTS_FILE).stat().st_size
    assert manifest.notes[EMBEDDING] == ("stored as i4, in a rotated basis",)


def test_a_rotated_model_computes_what_was_measured(rotated: Written) -> None:
    base, weights, out, _ = rotated
    client = OpenVino().load(out, dtype=None, device="cpu")
    found = outputs(client, "gemma3")
    assert (found - expected_outputs(base, weights, "gemma3")).abs().max() <= 1e-5
    ids = tiny_batches("gemma3", n_batches=1, batch_size=2, length=24, padded=False)[0]["input_ids"]
    parts = (client(ids[:, :20]).logits, client.extend(ids[:, 20:]).logits)
    assert (torch.cat(parts, 1) - client(ids).logits).abs().max() <= 1e-5


def test_the_manifest_states_types_and_bytes_of_the_file(gemma: Written) -> None:
    base, weights, out, manifest = gemma
    assert manifest.notes[EMBEDDING] == ("stored as i4",)
    widened = next(n for n, w in weights.items() if "bits=3" in str(w.scheme))
    assert manifest.notes[widened] == ("stored as u4, 3-bit codes in 4 bits",)
    assert manifest.storage_bytes == (out / WEIGHTS_FILE).stat().st_size
    graph = openvino.Core().read_model(out / MODEL_FILE)
    vocabulary = base.module.config.vocab_size
    tied = [
        op for op in graph.get_ops()
        if op.get_type_name() == "Constant" and op.get_byte_size() >= vocabulary * 16
        and list(op.shape)[:1] == [vocabulary]
    ]  # fmt: skip
    assert [op.get_element_type().get_type_name() for op in tied] == ["i4"]
    assert OpenVino().stored_bytes(out) == manifest.storage_bytes


def test_the_inputs_are_those_of_optimum(gemma: Written) -> None:
    graph = openvino.Core().read_model(gemma[2] / MODEL_FILE)
    names = {"input_ids", "attention_mask", "position_ids", "beam_idx"}
    assert all(len(port.names & names) == 1 for port in graph.inputs)
    assert len(graph.inputs) == len(names)
    assert [port.names & {"logits"} for port in graph.outputs] == [{"logits"}]
    assert len(graph.get_variables()) == 2 * gemma[0].module.config.num_hidden_layers


def test_an_encoder_of_16_bits_computes_in_32(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("bert-encoder", "bfloat16")
    weights = compress_all(base, SCHEMES)
    OpenVino().write(base, weights, tmp_path / "out", claim={})
    model = OpenVino().load(tmp_path / "out", dtype=None, device="cpu")
    batch = tiny_batches("bert-encoder", n_batches=1, batch_size=3, length=16)[0]
    found, real = model(**batch).last_hidden_state, batch["attention_mask"] > 0
    reference = copy.deepcopy(base.module).float()
    dense = {n: decode(w.tensors, w.scheme, w.shape, torch.float32) for n, w in weights.items()}
    with torch.no_grad(), overridden(reference, base.layout, dense):
        expected = reference(**batch).last_hidden_state
    assert (found - expected)[real].abs().max() <= 1e-5
    with pytest.raises(UsageError, match="keeps no keys and values"):
        model.extend(batch["input_ids"])


def test_a_file_that_does_not_compute_the_model_is_not_published(
    make_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("bert-encoder")
    weights = compress_all(base, ("rtn(bits=4,group_size=32)",))
    monkeypatch.setattr("autocompress.export.openvino_writing.replace_layer", lambda *parts: None)
    with pytest.raises(CheckpointError, match="must compute what torch computes"):
        OpenVino().write(base, weights, tmp_path / "out", claim={})
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_named(gemma: Written, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in gemma[2].iterdir():
        content = path.read_bytes()
        (other / path.name).write_bytes(content[:-1] if path.name == WEIGHTS_FILE else content)
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        OpenVino().load(other, dtype=None, device="cpu")


def test_models_that_one_graph_cannot_hold_are_refused(
    make_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, gemma = OpenVino(), make_base("gemma3")
    assert exporter.refusal_of_model(gemma) == ""
    assert "encoder-decoder like t5 needs two" in exporter.refusal_of_model(make_base("t5"))
    assert "mixture of experts" in exporter.refusal_of_model(make_base("mixtral"))
    config = gemma.module.config
    monkeypatch.setattr(config, "layer_types", ["full_attention", "chunked_attention"])
    assert "but those of gemma3_text are also chunked_attention" in exporter.refusal_of_model(gemma)
    monkeypatch.setattr(config, "layer_types", None)
    monkeypatch.setattr(config, "rope_parameters", {"rope_type": "dynamic"})
    assert "rope_type dynamic are not" in exporter.refusal_of_model(gemma)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "bert-classifier", "roberta",
     "distilbert", "vit"],
)  # fmt: skip
def test_every_family_reloads(family: str, make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base(family)
    weights = compress_all(base, SCHEMES)
    OpenVino().write(base, weights, tmp_path / "out", claim={})
    model = OpenVino().load(tmp_path / "out", dtype=None, device="cpu")
    difference = outputs(model, family) - expected_outputs(base, weights, family)
    assert difference.abs().max() <= 1e-5


@pytest.mark.slow
def test_a_fresh_process_loads_it(
    gemma: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "measure_openvino.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    base, weights, out, _ = gemma
    request = {"path": str(out), "family": "gemma3"}
    answer = run_fresh_process("measure_openvino", request, timeout_seconds=100)
    found = torch.tensor(answer["logits"])
    assert (found - expected_outputs(base, weights, "gemma3")).abs().max() <= 1e-5
