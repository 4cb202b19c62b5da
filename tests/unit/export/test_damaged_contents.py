"""Stored tensors of the right size that hold what no compression writes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from autocompress.core import Scheme
from autocompress.core.errors import CheckpointError
from autocompress.methods import (
    damage_of,
    decode,
    decode_rows,
    input_map,
    is_shared,
    own_tensors,
    sharing_layers,
)

from .test_format_reader import CHECKPOINTS, GOLDEN, LAYERS

Tensors = dict[str, Tensor]


def stored(checkpoint: str, name: str, tensors: Tensors) -> Tensors:
    """All that a layer decodes from."""

    def under(layer: str) -> Tensors:
        start = f"{layer}."
        return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

    scheme = Scheme.parse(LAYERS[checkpoint, name]["scheme"])
    lender = under(sharing_layers(name, scheme)[0])
    return {n: t for n, t in lender.items() if is_shared(n, scheme)} | under(name)


def damaged(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Other contents of a tensor: the same byte throughout, or random ones."""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    generator = torch.Generator().manual_seed(len(raw))
    contents = {f"{byte:02x}": torch.full_like(raw, byte) for byte in (0xFF, 0, 0x7C)}
    contents["random"] = torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8)
    for way, found in contents.items():
        yield way, found.view(tensor.dtype).view(tensor.shape)


def can_overflow(tensor: Tensor) -> bool:
    """Finite numbers whose products may not be."""
    return tensor.is_floating_point() and float(tensor.abs().max()) > 1e6


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_whatever_a_tensor_holds_is_refused_or_decodes_to_numbers(checkpoint: str) -> None:
    tensors = load_file(GOLDEN / checkpoint / "model.safetensors")
    for name in (layer for folder, layer in LAYERS if folder == checkpoint):
        entry = LAYERS[checkpoint, name]
        scheme, shape = Scheme.parse(entry["scheme"]), (entry["shape"][0], entry["shape"][1])
        intact = stored(checkpoint, name, tensors)
        assert damage_of(intact, scheme, shape) is None, name
        for leaf in own_tensors(name, scheme, intact):
            for way, wrong in damaged(intact[leaf]):
                found = damage_of({**intact, leaf: wrong}, scheme, shape)
                if found is None:
                    require_numbers({**intact, leaf: wrong}, scheme, shape, can_overflow(wrong))
                else:
                    assert _of_one_matrix(found.tensor, leaf), (name, leaf, way, found)


def _of_one_matrix(found: str, leaf: str) -> bool:
    """Codes and what gives them their meaning can only be told apart where one of them says so."""
    return found.rpartition(".")[0] == leaf.rpartition(".")[0]


def require_numbers(tensors: Tensors, scheme: Scheme, shape: tuple[int, int], huge: bool) -> None:
    matrix = decode(tensors, scheme, shape, torch.float32)
    assert huge or bool(torch.isfinite(matrix).all()), scheme
    decode_rows(tensors, scheme, shape, torch.tensor([0, shape[0] - 1]), torch.float32)
    mapped = input_map(tensors, scheme)
    if mapped is not None:
        assert bool(torch.isfinite(mapped(torch.ones(2, shape[1]))).all()), scheme


@pytest.mark.parametrize(
    ("layer", "leaf", "value", "message"),
    [
        ("3.self_attn.k_proj", "r.index", -1, "must ascend within 0 to 23"),
        ("3.self_attn.k_proj", "r.index", 1, "must ascend within 0 to 23"),  # every place the same
        ("3.self_attn.o_proj", "r.index", 1 << 20, "must ascend within 0 to 575"),
        ("3.self_attn.v_proj", "r.index", 300, "must ascend within 0 to 23"),
        ("3.self_attn.v_proj", "r.counts", 9, "must be at least 0 and add up to 29"),
        ("3.self_attn.v_proj", "r.counts", -1, "must be at least 0 and add up to 29"),
        ("0.self_attn.k_proj", "mask", 1, "must keep 144 of 288 weights"),
        ("0.self_attn.q_proj", "packed", 255, "must hold finite numbers"),
        ("0.self_attn.v_proj", "packed", 0x7F, "must hold codes of numbers"),
        ("0.self_attn.o_proj", "packed", 0xFC, "must hold codes of numbers"),
        ("1.self_attn.v_proj", "packed", 0xC0, "must hold codes of numbers"),
        ("0.mlp.up_proj", "scales", 127, "must hold codes from 1 to 126"),
        ("0.mlp.down_proj", "scales", 255, "must hold codes from 1 to 252"),
        ("0.mlp.down_proj", "scales", 0, "must hold codes from 1 to 252"),
        ("1.mlp.up_proj", "codebook", float("nan"), "must be finite"),
        (
            "2.self_attn.k_proj",
            "packed",
            3,
            r"must start with widths of bands among \(0, 2, 4, 8\)",
        ),
        ("2.mlp.gate_proj", "t.scales", 0, "must be positive"),
    ],
)
def test_what_is_wrong_is_named(layer: str, leaf: str, value: float, message: str) -> None:
    name = f"model.layers.{layer}"
    entry = LAYERS["packed_methods", name]
    tensors = load_file(GOLDEN / "packed_methods" / "model.safetensors")
    found = stored("packed_methods", name, tensors)
    found[leaf] = torch.full_like(found[leaf], value)
    damage = damage_of(found, Scheme.parse(entry["scheme"]), tuple(entry["shape"]))
    assert damage is not None
    assert damage.tensor == leaf
    assert re.match(message, damage.reason), damage.reason


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModel"])
def test_a_load_names_file_layer_and_tensor(auto_class: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(GOLDEN / "packed_sharing", path)
    name = "model.layers.2.self_attn.q_proj"
    tensors = load_file(path / "model.safetensors")
    tensors[f"{name}.a.values"][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    shown = name if auto_class == "AutoModelForCausalLM" else name.removeprefix("model.")
    expected = f"model.safetensors is damaged: tensor {shown}.a.values of layer {shown} must be fin"
    with pytest.raises(CheckpointError, match=expected):
        getattr(transformers, auto_class).from_pretrained(path)
