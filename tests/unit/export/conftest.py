"""Tiny base models, compressed layer by layer, and their exports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from autocompress.core import LayerSpec, Scheme
from autocompress.core.errors import SchemeError
from autocompress.export.hook import install
from autocompress.methods import CompressedWeight, LayerStatistics, check, compress
from autocompress.models import BaseModel, describe, overridden, weight_matrix
from autocompress.models.experts import separate_experts
from autocompress.models.quiet import quiet_transformers
from autocompress.testing.tiny_models import (
    auto_class_of,
    save_tiny,
    tiny_batches,
    tiny_tokenizer,
)

install()

SCHEMES = (
    "rtn(bits=4,group_size=32)",
    "rtn(bits=3,group_size=24,symmetric=false)",
    "magnitude(sparsity=0.7)",
    "magnitude(sparsity=0.6)+rtn(bits=8,group_size=0)",
    "svd(rank=9)",
    "svd(rank=7)+rtn(bits=5,group_size=16)",
    "svd(rank=8)+wanda(sparsity=0.5)+rtn(bits=2,group_size=16,symmetric=false)",
)
"""Each method and composition of this version at least once, with ragged groups and odd widths."""

Compressed = Mapping[str, CompressedWeight]


def scheme_that_fits(layer: LayerSpec, schemes: Iterable[str]) -> Scheme:
    """The first scheme that the layer can take (a tiny head is too small to factorize)."""
    for text in schemes:
        scheme = Scheme.parse(text)
        try:
            check(layer, scheme)
        except SchemeError:
            continue
        return scheme
    raise AssertionError(layer)


def compress_all(
    base: BaseModel, schemes: tuple[str, ...] = SCHEMES
) -> dict[str, CompressedWeight]:
    """Every layer compressed, the schemes in turn."""
    turn = cycle(range(len(schemes)))
    weights = {}
    for layer in base.layout.layers:
        first = next(turn)
        scheme = scheme_that_fits(layer, schemes[first:] + schemes[:first] + SCHEMES)
        matrix = weight_matrix(base.module, layer)
        weights[layer.name] = compress(matrix, scheme, LayerStatistics.none())
    return weights


def outputs(module: nn.Module, family: str) -> Tensor:
    """Logits (or hidden states) on one fixed batch."""
    batch = tiny_batches(family, n_batches=1, batch_size=2, length=16)[0]
    with torch.no_grad():
        result = module(
            **batch
        )  # sequence-to-sequence models read their decoder's input off labels
    logits = getattr(result, "logits", None)
    return result.last_hidden_state if logits is None else logits


def expected_outputs(base: BaseModel, weights: Compressed, family: str) -> Tensor:
    """What the search measured: the base model with dense overrides."""
    dense = {name: weight.to_dense() for name, weight in weights.items()}
    with overridden(base.module, base.layout, dense):
        return outputs(base.module, family)


def from_pretrained(base: BaseModel, path: Path) -> nn.Module:
    """Load with transformers alone."""
    with quiet_transformers():
        model = getattr(transformers, base.auto_class).from_pretrained(path)
    assert isinstance(model, nn.Module)
    return model


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BaseModel]:
    """A base model of a family, read from a checkpoint as users do; one per family and dtype."""
    made: dict[tuple[str, str], BaseModel] = {}

    def make(family: str, dtype: str = "float32") -> BaseModel:
        if (family, dtype) not in made:
            made[family, dtype] = _load(family, dtype, tmp_path_factory.mktemp(family))
        return made[family, dtype]

    return make


def _load(family: str, dtype: str, path: Path) -> BaseModel:
    save_tiny(family, path)
    auto_class = auto_class_of(family)
    with quiet_transformers():
        module = getattr(transformers, auto_class).from_pretrained(path, dtype=dtype).eval()
    separate_experts(module)
    return BaseModel(
        module=module.requires_grad_(False),
        layout=describe(module),
        processor=None if family == "vit" else tiny_tokenizer(family),
        source=str(path),
        auto_class=auto_class,
        digest="0" * 32,
    )


@pytest.fixture
def base(make_base: Callable[..., BaseModel]) -> BaseModel:
    """A tiny Qwen 2: rotary positions, biases, a head that is tied to the embedding."""
    return make_base("qwen2")


@pytest.fixture
def weights(base: BaseModel) -> dict[str, CompressedWeight]:
    """Every layer of `base` compressed."""
    return compress_all(base)
