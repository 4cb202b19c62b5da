"""Layers that share in a packed checkpoint: stored once, counted once, the same after a reload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from autocompress.core import Allocation, Scheme
from autocompress.core.errors import CheckpointError, SchemeError
from autocompress.cost import CostModel, DeviceProfile
from autocompress.export import load, write_packed
from autocompress.export.tensor_file import read_header, stored_bytes
from autocompress.methods import (
    CompressedWeight,
    LayerStatistics,
    canonical,
    compress_together,
    footprint,
)
from autocompress.models import BaseModel, weight_matrix

from .conftest import expected_outputs, from_pretrained, outputs

SCHEMES = {
    "self_attn.q_proj": "basis_sharing(blocks=0/1,rank=8)",
    "self_attn.k_proj": "basis_sharing(blocks=0/1,rank=8)+rtn(bits=4,group_size=16)",
    "mlp.gate_proj": "tied(blocks=0/1)+rtn(bits=8)",
    "self_attn.o_proj": "tied(blocks=0/1)+rtn(bits=4)+eora(rank=2)",
    "self_attn.v_proj": "autoencoder(blocks=0/1,piece=4,latents=5,steps=2)",
    "mlp.up_proj": "basis_sharing(blocks=0/1,rank=9)+rtn(bits=8)+eora(rank=2)",
}
DEVICE = DeviceProfile("slow", 1e6, 1e5, 10**9, "made up")


@pytest.fixture(scope="module")
def shared(make_base) -> tuple[BaseModel, dict[str, CompressedWeight]]:
    """A tiny Qwen 2 of two blocks, some of whose layers share."""
    base = make_base("qwen2")
    weights: dict[str, CompressedWeight] = {}
    for part, text in SCHEMES.items():
        names = [f"model.layers.{block}.{part}" for block in (0, 1)]
        matrices = [weight_matrix(base.module, base.layout.layer(name)) for name in names]
        statistics = [LayerStatistics.none()] * 2
        found = compress_together(matrices, Scheme.parse(text), statistics)
        weights |= dict(zip(names, found, strict=True))
    return base, weights


@pytest.fixture(scope="module")
def written(shared, tmp_path_factory) -> Path:
    base, weights = shared
    out = tmp_path_factory.mktemp("shared") / "out"
    claimed = base.layout.base_bytes - sum(
        base.layout.layer(n).base_bytes - footprint(base.layout.layer(n), w.scheme).storage_bytes
        for n, w in weights.items()
    )
    write_packed(base, weights, out, claim={"storage_bytes": claimed})
    assert stored_bytes(out) == claimed
    return out


def test_what_is_shared_is_in_the_file_once(shared, written) -> None:
    _, weights = shared
    entries = read_header(written / "model.safetensors")
    first, second = (f"model.layers.{block}.self_attn.q_proj" for block in (0, 1))
    assert {f"{first}.a.values", f"{first}.b.values", f"{second}.a.values"} <= set(entries)
    assert f"{second}.b.values" not in entries
    assert "b.values" in weights[second].tensors


def test_a_reload_computes_the_same_bits_and_saves_the_same_tensors(
    shared, written, tmp_path
) -> None:
    base, weights = shared
    expected = expected_outputs(base, weights, "qwen2")
    loaded = load(written)
    assert torch.equal(outputs(loaded, "qwen2"), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(written)
    assert torch.equal(outputs(from_pretrained(base, tmp_path / "again"), "qwen2"), expected)


def test_a_model_without_the_head_shares_under_other_names(shared, written, tmp_path) -> None:
    headless = AutoModel.from_pretrained(written)
    whole = outputs(load(written).model, "qwen2")
    assert torch.equal(outputs(headless, "qwen2"), whole)
    headless.save_pretrained(tmp_path / "headless")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "headless"), "qwen2"), whole)


def test_kernels_leave_layers_that_share_to_the_reference(shared, written) -> None:
    base, weights = shared
    loaded = load(written, kernels="dense")
    assert torch.equal(outputs(loaded, "qwen2"), expected_outputs(base, weights, "qwen2"))


def test_moving_the_model_moves_what_is_shared_and_keeps_its_dtype(written) -> None:
    loaded = load(written).to(torch.bfloat16)
    layer = loaded.get_submodule("model.layers.1.self_attn.k_proj")
    assert layer.stored()["b.scales"].dtype == torch.float16
    assert layer.matrix().dtype == torch.bfloat16


def test_the_cost_of_an_allocation_is_the_file_and_counts_every_reading(shared, written) -> None:
    base, weights = shared
    layers = tuple(base.layout.layers)
    cost = CostModel(layers, base.layout.other_bytes, 0, DEVICE)
    allocation = Allocation.of({name: weight.scheme for name, weight in weights.items()})
    resources = cost.resources(allocation)
    assert resources["storage_bytes"].value == stored_bytes(written)
    borrowed = sum(
        layout.n_bytes
        for name, weight in weights.items()
        for layout in footprint(base.layout.layer(name), weight.scheme).borrowed.values()
    )
    parts = [cost.part(layer, allocation.scheme(layer.name)) for layer in layers]
    packed = [p for p, layer in zip(parts, layers, strict=True) if layer.name in weights]
    assert sum(p.moved - p.stored for p in packed) == borrowed > 0
    half = dict(list(allocation.items())[:1])
    with pytest.raises(SchemeError, match="has base"):
        cost.resources(Allocation.of(half))


def test_layers_that_were_not_compressed_together_are_refused(shared, tmp_path) -> None:
    base, weights = shared
    name = "model.layers.1.self_attn.q_proj"
    other = dict(weights[name].tensors)
    other["b.values"] = other["b.values"] + 1
    changed = CompressedWeight(
        weights[name].shape, weights[name].dtype, weights[name].scheme, other
    )
    with pytest.raises(CheckpointError, match=r"layers\.1.* shares b.values with .*layers\.0"):
        write_packed(base, {**weights, name: changed}, tmp_path / "out", claim={})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_names_one_of_them_alone_is_refused(shared, written, tmp_path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in written.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    entry = config["quantization_config"]["layers"]["model.layers.0.self_attn.q_proj"]
    entry["scheme"] = str(canonical(Scheme.parse("svd(rank=8)")))
    (copy / "config.json").write_text(json.dumps(config))
    base, _ = shared
    with pytest.raises(CheckpointError, match=r"Layers that share have one scheme"):
        from_pretrained(base, copy)
