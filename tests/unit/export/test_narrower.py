"""Neurons and heads that all blocks can spare leave a dense model; others stay, as zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autocompress.core import Allocation, Scheme
from autocompress.export import write_dense
from autocompress.methods import (
    CompressedWeight,
    LayerProblem,
    LayerStatistics,
    compress,
    reader,
)
from autocompress.models import BaseModel, weight_matrix
from autocompress.spaces import load_space

from .conftest import expected_outputs, from_pretrained, outputs

SPACE = """
schema_version: 1
name: narrow
description: A test.
ties: {{sublayers: true}}
choices:
  - roles: [{roles}]
    options:
      - width: [{{method: magnitude_sp, keep_ratio: [0.5, 0.75]}}]
"""
FEED_FORWARD, ATTENTION = "gate, up, down", "query, key, value, output"


def narrowed(
    base: BaseModel, roles: str, levels: tuple[int, ...], path: Path
) -> dict[str, CompressedWeight]:
    """The parts of each block at the given levels: 0 keeps half of a width, 1 three quarters."""
    path.write_text(SPACE.format(roles=roles))
    weights = {}
    choices = load_space(str(path), base.layout.layers).choices
    for choice, level in zip(choices, levels, strict=True):
        for name, scheme in zip(choice.layers, choice.options[level].schemes, strict=True):
            weights[name] = compressed(base, name, scheme)
    return weights


def compressed(base: BaseModel, name: str, scheme: Scheme) -> CompressedWeight:
    by = reader(name, scheme)
    weight = weight_matrix(base.module, base.layout.layer(name))
    read = None
    if by is not None:
        matrix = weight_matrix(base.module, base.layout.layer(by))
        read = LayerProblem(matrix, LayerStatistics.none())
    return compress(weight, scheme, LayerStatistics.none(), reader=read)


def written(base: BaseModel, weights: dict[str, CompressedWeight], out: Path) -> int:
    """Bytes of a dense export."""
    dense = {name: weight.to_dense() for name, weight in weights.items()}
    allocation = Allocation.of({name: weight.scheme for name, weight in weights.items()})
    return write_dense(base, dense, allocation, out, claim={}).storage_bytes


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "vit", "distilbert"])
def test_the_feed_forward_parts_are_as_narrow_as_the_widest_needs(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    weights = narrowed(base, FEED_FORWARD, (0, 1), tmp_path / "space.yaml")
    before = {name: tensor.clone() for name, tensor in base.module.state_dict().items()}
    found = written(base, weights, tmp_path / "out")
    narrow = from_pretrained(base, tmp_path / "out")
    config = narrow.config
    width = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None)
    assert (width or config.n_inner) == 72  # three quarters of 96
    expected = expected_outputs(base, weights, family)
    torch.testing.assert_close(outputs(narrow, family), expected, rtol=1e-5, atol=1e-6)
    n_gone = 24 * sum(  # rows of what writes the width, columns of what reads it, and biases
        (x.in_features if x.role != "down" else x.out_features)
        + (x.role != "down" and base.module.get_submodule(x.name).bias is not None)
        for x in base.layout.layers
        if x.role in {"gate", "up", "down"}
    )
    assert found == base.layout.base_bytes - 4 * n_gone
    after = base.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_heads_go_with_their_keys(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    weights = narrowed(base, ATTENTION, (0, 0), tmp_path / "space.yaml")
    assert written(base, weights, tmp_path / "out") < base.layout.base_bytes
    narrow = from_pretrained(base, tmp_path / "out")
    assert (narrow.config.num_attention_heads, narrow.config.num_key_value_heads) == (2, 1)
    expected = expected_outputs(base, weights, family)
    torch.testing.assert_close(outputs(narrow, family), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "roles", "levels"),
    [
        ("bert", ATTENTION, (0, 0)),  # its config has no width of a head
        ("t5", FEED_FORWARD, (0, 0, 0, 0)),  # two stacks
        ("gpt2", "qkv, output", (0, 0)),  # query, key and value side by side
    ],
)
def test_what_a_config_cannot_say_stays_as_zeros(
    family: str,
    roles: str,
    levels: tuple[int, ...],
    make_base: Callable[..., BaseModel],
    tmp_path: Path,
) -> None:
    base = make_base(family)
    weights = narrowed(base, roles, levels, tmp_path / "space.yaml")
    assert written(base, weights, tmp_path / "out") == base.layout.base_bytes
    expected = expected_outputs(base, weights, family)
    assert torch.equal(outputs(from_pretrained(base, tmp_path / "out"), family), expected)


def test_one_block_that_is_whole_keeps_all_wide(
    make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base("llama")
    weights = narrowed(base, FEED_FORWARD, (0, 0), tmp_path / "space.yaml")
    first = {name: weight for name, weight in weights.items() if ".layers.0." in name}
    assert written(base, first, tmp_path / "out") == base.layout.base_bytes


def test_a_dropped_part_narrows_to_whatever_the_others_need(
    make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base("llama")
    weights = narrowed(base, FEED_FORWARD, (1, 1), tmp_path / "space.yaml")
    for name in list(weights):
        if ".layers.0." in name:
            weights[name] = compressed(base, name, Scheme.parse("drop"))
    assert written(base, weights, tmp_path / "out") < base.layout.base_bytes
    narrow = from_pretrained(base, tmp_path / "out")
    assert narrow.config.intermediate_size == 72
    expected = expected_outputs(base, weights, "llama")
    torch.testing.assert_close(outputs(narrow, "llama"), expected, rtol=1e-5, atol=1e-6)
