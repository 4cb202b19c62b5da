"""Dropped blocks leave a dense model; where something of them is left, they stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress.core import Allocation, Scheme
from autocompress.export import stored_bytes, write_dense
from autocompress.export.shorter import shortened
from autocompress.methods import CompressedWeight, LayerStatistics, compress
from autocompress.models import BaseModel, weight_matrix

from .conftest import expected_outputs, from_pretrained, outputs

DROP = Scheme.parse("drop")


def dropped(
    base: BaseModel, block: int, roles: tuple[str, ...] = ()
) -> dict[str, CompressedWeight]:
    """The layers of a block, or those of some roles, under `drop`."""
    return {
        layer.name: compress(weight_matrix(base.module, layer), DROP, LayerStatistics.none())
        for layer in base.layout.layers
        if layer.block == block and (not roles or layer.role in roles)
    }


def written(base: BaseModel, weights: dict[str, CompressedWeight], out: Path) -> int:
    """Bytes of a dense export."""
    dense = {name: weight.to_dense() for name, weight in weights.items()}
    allocation = Allocation.of({name: weight.scheme for name, weight in weights.items()})
    return write_dense(base, dense, allocation, out, claim={}).storage_bytes


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3"])
def test_a_block_of_which_nothing_is_left_is_not_written(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    n_blocks = base.module.config.num_hidden_layers
    weights = dropped(base, 0)
    expected = expected_outputs(base, weights, family)
    before = {name: tensor.clone() for name, tensor in base.module.state_dict().items()}
    found = written(base, weights, tmp_path / "out")
    shorter = from_pretrained(base, tmp_path / "out")
    assert shorter.config.num_hidden_layers == n_blocks - 1
    assert torch.equal(outputs(shorter, family), expected)
    assert found == stored_bytes(tmp_path / "out") < base.layout.base_bytes
    assert base.module.config.num_hidden_layers == n_blocks
    after = base.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(("family", "roles"), [("bert", ()), ("llama", ("gate", "up", "down"))])
def test_a_block_that_still_does_something_stays(
    family: str, roles: tuple[str, ...], make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    """A norm after the sum, or attention that is left."""
    base = make_base(family)
    weights = dropped(base, 0, roles)
    expected = expected_outputs(base, weights, family)
    assert written(base, weights, tmp_path / "out") == base.layout.base_bytes
    assert torch.equal(outputs(from_pretrained(base, tmp_path / "out"), family), expected)


def test_a_bias_keeps_a_block(make_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    shared = make_base("gpt2")
    base = replace(shared, module=copy.deepcopy(shared.module))
    projection = base.module.get_submodule("transformer.h.0.mlp.c_proj")
    assert isinstance(projection.bias, nn.Parameter)
    with torch.no_grad():
        projection.bias.fill_(0.25)
    weights = dropped(base, 0)
    expected = expected_outputs(base, weights, "gpt2")
    assert written(base, weights, tmp_path / "out") == base.layout.base_bytes
    assert torch.equal(outputs(from_pretrained(base, tmp_path / "out"), "gpt2"), expected)


def test_a_model_whose_config_names_blocks_keeps_them(
    make_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("llama")
    weights = dropped(base, 0)
    allocation = Allocation.of({name: weight.scheme for name, weight in weights.items()})
    monkeypatch.setattr(base.module.config, "mlp_only_layers", [1], raising=False)
    with shortened(base.module, base.layout, allocation, base.auto_class) as gone:
        assert gone == 0


def test_one_block_is_always_left(make_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = make_base("llama")
    n_blocks = base.module.config.num_hidden_layers
    weights = {}
    for block in range(n_blocks):
        weights |= dropped(base, block)
    expected = expected_outputs(base, weights, "llama")
    written(base, weights, tmp_path / "out")
    shorter = from_pretrained(base, tmp_path / "out")
    assert shorter.config.num_hidden_layers == 1
    assert torch.equal(outputs(shorter, "llama"), expected)
