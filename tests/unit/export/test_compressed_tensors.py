import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from autocompress.core import LayerSpec, Scheme
from autocompress.core.errors import UsageError
from autocompress.export import load
from autocompress.export.compressed_tensors import pack_words
from autocompress.export.exporter import require_packages
from autocompress.export.formats import EXPORTERS
from autocompress.export.tensor_file import read_header, stored_bytes
from autocompress.methods import CompressedWeight, LayerStatistics, canonical, compress
from autocompress.models import BaseModel, weight_matrix
from autocompress.testing.tiny_models import FAMILIES

from .conftest import expected_outputs, outputs

pytest.importorskip("compressed_tensors")

EXPORTER = EXPORTERS["compressed-tensors"]
INTEGERS = (
    "rtn(bits=4,group_size=32)", "rtn(bits=3,group_size=0)", "rtn(bits=2,group_size=16)",
    "rtn(bits=8,group_size=32)", "rtn(bits=5,group_size=0)", "rtn(bits=6,group_size=16)",
    "rtn(bits=7,group_size=32)",
)  # fmt: skip
W8A8 = "rtn(bits=8,group_size=0)+int_inputs(bits=8)"


def compressed(base: BaseModel, schemes: tuple[str, ...]) -> dict[str, CompressedWeight]:
    """Every layer that the format holds, the schemes in turn."""
    weights = {}
    for layer in base.layout.layers:
        scheme = canonical(Scheme.parse(schemes[len(weights) % len(schemes)]))
        if not EXPORTER.refusal(layer, scheme):
            matrix = weight_matrix(base.module, layer)
            weights[layer.name] = compress(matrix, scheme, LayerStatistics.none())
    assert len(weights) >= 12
    return weights


def a_layer(**changes: Any) -> LayerSpec:
    facts = {
        "name": "x", "role": "up", "block": 0, "out_features": 64, "in_features": 96,
        "kind": "linear", "dtype": "float32", "input_name": "x", "macs_per_token": 1,
    }  # fmt: skip
    return LayerSpec(**{**facts, **changes})


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", [32, 64, 48, 33, 7, 1])
def test_words_are_those_of_the_packages_own_packing(bits: int, width: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 1 << bits, (5, width), generator=torch.Generator().manual_seed(bits))
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_words(codes.to(torch.uint8), bits), pack_to_int32(signed, bits))


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "bart"])
def test_the_stock_client_decodes_the_very_weights_and_computes_the_same(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    weights = compressed(base, INTEGERS)
    assert any(bool((w.tensors["scales"] < 0).any()) for w in weights.values())
    manifest = EXPORTER.write(base, weights, tmp_path / "out", claim={})
    model = load(tmp_path / "out")
    assert torch.equal(outputs(model, family), expected_outputs(base, weights, family))
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.to_dense())
    assert manifest.storage_bytes == stored_bytes(tmp_path / "out") < base.layout.base_bytes
    assert manifest.checkpoint_format == "compressed-tensors"
    assert not manifest.simulated


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_stock_transformers_cannot_load_packed_are_refused(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    t5 = "of its T5Attention wants"
    reason = {"t5": t5, "t5-gated": t5, "mixtral": "joins no experts"}.get(family)
    if reason is None:
        assert EXPORTER.refusal_of_model(base) == ""
        return
    with pytest.raises(UsageError, match=rf"cannot hold this model.*{reason}.*Next step"):
        EXPORTER.write(base, compressed(base, INTEGERS), tmp_path / "out", claim={})
    assert list(tmp_path.iterdir()) == []


CLIENT = """
import sys, torch, transformers
path, auto_class, batch = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(path).eval()
with torch.no_grad():
    logits = model(**torch.load(batch)).logits
assert not any(name.split(".")[0] == "autocompress" for name in sys.modules)
torch.save(logits, path + "/logits.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("bert", "float16")])
def test_a_process_that_knows_nothing_of_this_package_computes_the_same(
    family: str, dtype: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    from autocompress.testing.tiny_models import tiny_batches

    base = make_base(family, dtype)
    weights = compressed(base, INTEGERS)
    EXPORTER.write(base, weights, tmp_path / "out", claim={})
    torch.save(tiny_batches(family, n_batches=1, batch_size=2, length=16)[0], tmp_path / "batch")
    arguments = [tmp_path / "out", base.auto_class, tmp_path / "batch"]
    subprocess.run([sys.executable, "-P", "-c", CLIENT, *map(str, arguments)], check=True)
    logits = torch.load(tmp_path / "out" / "logits.pt")
    assert torch.equal(logits, expected_outputs(base, weights, family))


def test_a_bfloat16_model_is_decoded_up_to_the_rounding_of_its_scales(
    make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base("llama", "bfloat16")
    weights = compressed(base, INTEGERS)
    EXPORTER.write(base, weights, tmp_path / "out", claim={})
    model = load(tmp_path / "out")
    _ = outputs(model, "llama")
    for name, weight in weights.items():
        found, exact = model.get_submodule(name).weight.float(), weight.to_dense().float()
        assert torch.all((found - exact).abs() <= 2.0**-7 * exact.abs())


def test_eight_bit_inputs_are_written_as_int8_and_stay_within_the_clients_other_grid(
    make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base("llama")
    weights = compressed(base, (W8A8,))
    EXPORTER.write(base, weights, tmp_path / "out", claim={})
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    entries = read_header(tmp_path / "out" / "model.safetensors")
    assert {entries[f"{name}.weight"].dtype for name in weights} == {"int8"}
    model = load(tmp_path / "out")
    found, dense = outputs(model, "llama"), expected_outputs(base, weights, "llama")
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.to_dense())
    assert 0 < float((found - dense).abs().max()) < 0.02 * float(dense.abs().max())


def test_an_export_without_compressed_layers_is_the_plain_model(
    base: BaseModel, tmp_path: Path
) -> None:
    EXPORTER.write(base, {}, tmp_path / "out", claim={})
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(outputs(load(tmp_path / "out"), "qwen2"), outputs(base.module, "qwen2"))


@pytest.mark.parametrize(
    ("changes", "scheme", "reason"),
    [
        ({"kind": "embedding"}, "rtn(bits=4,group_size=0)", "linear layers only"),
        ({"kind": "conv1d"}, "rtn(bits=4,group_size=0)", "linear layers only.*conv1d"),
        ({"aliases": ("lm_head",)}, "rtn(bits=4,group_size=0)", "tied to lm_head"),
        ({}, "rtn(bits=4,group_size=0,symmetric=false)", "symmetric must be true"),
        ({}, "rtn(bits=4,group_size=64)", "divide the 96 inputs.*got 64.*legal value is 48"),
        ({}, "wanda(sparsity=0.5)+rtn(bits=4,group_size=32)", "nothing beside them.*wanda"),
        ({}, "svd(rank=8)+rtn(bits=4,group_size=0)", "nothing beside them.*svd"),
        ({}, "hadamard+rtn(bits=4,group_size=32)", "nothing beside them.*hadamard"),
        ({}, "magnitude(sparsity=0.5)", "integer codes of rtn or gptq.*magnitude"),
        ({}, "rtn(bits=4,group_size=0)+int_inputs(bits=8)", "bits=8, group_size=0.*bits=4"),
        ({}, "rtn(bits=8,group_size=32)+int_inputs(bits=8)", "bits=8, group_size=0.*32"),
        ({}, "rtn(bits=8,group_size=0)+int_inputs(bits=6)", r"int_inputs\(bits=8\).*bits=6"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_its_rule(
    changes: Mapping[str, Any], scheme: str, reason: str
) -> None:
    import re

    found = EXPORTER.refusal(a_layer(**changes), Scheme.parse(scheme))
    assert re.search(reason, found), found


@pytest.mark.parametrize(
    "scheme", [*INTEGERS, W8A8, "gptq(bits=4,group_size=128)", "gptq(group_size=96)", "base"]
)
def test_integer_schemes_are_held(scheme: str) -> None:
    assert EXPORTER.refusal(a_layer(), canonical(Scheme.parse(scheme))) == ""


def test_a_refusal_names_the_layer_and_writes_nothing(base: BaseModel, tmp_path: Path) -> None:
    layer = base.layout.layers[0]
    scheme = canonical(Scheme.parse("rtn(bits=4,group_size=0)"))
    weight = compress(weight_matrix(base.module, layer), scheme, LayerStatistics.none())
    with pytest.raises(UsageError, match=rf"{layer.name}: it holds linear layers only.*Next step"):
        EXPORTER.write(base, {layer.name: weight}, tmp_path / "out", claim={})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"compressed_tensors.*'autocompress\[compressed-tensors"):
        require_packages(EXPORTER)
    require_packages(EXPORTERS["packed"])


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def vllm_schemes(path: Path) -> dict[str, tuple[Any, ...] | None]:
    """Scheme by layer as vLLM's loader finds it, its fused layers as one; None: not quantized.

    The rules of `CompressedTensorsConfig.get_scheme`, `should_ignore_layer`, `find_matched_target`
    and `_get_scheme_from_parts` in vllm/model_executor/layers/quantization/compressed_tensors.
    """
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    by_target = {t: group for group in config["config_groups"].values() for t in group["targets"]}
    schemes: dict[str, tuple[Any, ...] | None] = {}
    names = [*by_target, *config["ignore"]]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused = next((key for key, parts in FUSED.items() if leaf in parts), None)
        shards = [name] if fused is None else [f"{parent}.{part}" for part in FUSED[fused]]
        ignored = {shard in config["ignore"] for shard in shards}
        assert len(ignored) == 1, f"{shards} are in part ignored"
        groups = [by_target[shard] for shard in shards if shard in by_target]
        assert all(group == groups[0] for group in groups), f"{shards} differ"
        label = name if fused is None else f"{parent}.{fused}"
        schemes[label] = _vllm_scheme(groups[0]) if groups else None
    return schemes


def _vllm_scheme(group: Mapping[str, Any]) -> tuple[Any, ...]:
    weights, inputs = group["weights"], group["input_activations"]
    assert weights["symmetric"]
    assert not weights["dynamic"]
    if inputs is None:
        assert group["format"] == "pack-quantized"
        assert weights["num_bits"] in (4, 8)
        assert weights["group_size"] in (
            (None,) if weights["strategy"] == "channel" else (32, 64, 128)
        )
        return ("WNA16", weights["num_bits"], weights["group_size"])
    assert group["format"] == "int-quantized"
    assert weights["num_bits"] == inputs["num_bits"] == 8
    assert (weights["strategy"], inputs["strategy"], inputs["dynamic"]) == (
        "channel",
        "token",
        True,
    )
    return ("W8A8Int8",)


def test_the_file_fits_the_rules_of_vllms_loader(
    make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base("llama")
    by_role = {
        "query": "rtn(bits=4,group_size=32)", "key": "rtn(bits=4,group_size=32)",
        "value": "rtn(bits=4,group_size=32)", "output": W8A8, "down": "rtn(bits=8,group_size=0)",
    }  # fmt: skip
    weights = {
        layer.name: compress(
            weight_matrix(base.module, layer),
            canonical(Scheme.parse(by_role[layer.role])),
            LayerStatistics.none(),
        )
        for layer in base.layout.layers
        if layer.role in by_role
    }
    EXPORTER.write(base, weights, tmp_path / "out", claim={})
    found = vllm_schemes(tmp_path / "out")
    assert found["model.layers.0.self_attn.qkv_proj"] == ("WNA16", 4, 32)
    assert found["model.layers.1.self_attn.o_proj"] == ("W8A8Int8",)
    assert found["model.layers.1.mlp.down_proj"] == ("WNA16", 8, None)
    assert found["model.layers.0.mlp.gate_up_proj"] is None
    assert found["lm_head"] is None
    entries = read_header(tmp_path / "out" / "model.safetensors")
    q = "model.layers.0.self_attn.q_proj"
    assert (entries[f"{q}.weight_packed"].dtype, entries[f"{q}.weight_packed"].shape) == (
        "int32",
        (64, 8),
    )
    assert (entries[f"{q}.weight_scale"].dtype, entries[f"{q}.weight_scale"].shape) == (
        "float16",
        (64, 2),
    )
    assert (entries[f"{q}.weight_shape"].dtype, entries[f"{q}.weight_shape"].shape) == (
        "int64",
        (2,),
    )
