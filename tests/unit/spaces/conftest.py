from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from autocompress.core import LayerSpec
from autocompress.spaces import SearchSpace, load_space


def block_layers(block: int, *, width: int = 64, key_width: int = 32) -> list[LayerSpec]:
    """One Llama-like block with grouped key and value heads."""

    def layer(part: str, role: str, rows: int, columns: int, reads: str) -> LayerSpec:
        name = f"model.layers.{block}.{part}"
        reads = f"model.layers.{block}.{reads}"
        return LayerSpec(
            name, role, block, rows, columns, "linear", "float32", reads, rows * columns
        )

    return [
        layer("self_attn.q_proj", "query", width, width, "self_attn.q_proj"),
        layer("self_attn.k_proj", "key", key_width, width, "self_attn.q_proj"),
        layer("self_attn.v_proj", "value", key_width, width, "self_attn.q_proj"),
        layer("self_attn.o_proj", "output", width, width, "self_attn.o_proj"),
        layer("mlp.gate_proj", "gate", 2 * width, width, "mlp.gate_proj"),
        layer("mlp.up_proj", "up", 2 * width, width, "mlp.gate_proj"),
        layer("mlp.down_proj", "down", width, 2 * width, "mlp.down_proj"),
    ]


@pytest.fixture
def layers() -> list[LayerSpec]:
    """Two blocks and an embedding that is also the head."""
    embedding = LayerSpec(
        "model.embed_tokens", "embedding", None, 320, 64, "embedding", "float32",
        "lm_head", 320 * 64, aliases=("lm_head",),
    )  # fmt: skip
    return [embedding, *block_layers(0), *block_layers(1)]


@pytest.fixture
def blocks() -> Callable[[int], list[LayerSpec]]:
    """The layers of some blocks, by their number."""
    return lambda n: [layer for block in range(n) for layer in block_layers(block)]


@pytest.fixture
def space_of(tmp_path: Path, layers: list[LayerSpec]) -> Callable[..., SearchSpace]:
    """Write the `choices` part of a space file and load it on `layers`."""

    def load(choices: str, head: str = "", model: list[LayerSpec] | None = None) -> SearchSpace:
        path = tmp_path / "mine.yaml"
        path.write_text(
            f"schema_version: 1\nname: mine\ndescription: A test.\n{head}choices:\n{choices}"
        )
        return load_space(str(path), layers if model is None else model)

    return load
