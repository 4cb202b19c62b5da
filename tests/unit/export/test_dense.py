from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autocompress.core import Allocation
from autocompress.core.errors import ModelError
from autocompress.export import Manifest, load, stored_bytes, write_dense
from autocompress.models import BaseModel

from .conftest import compress_all, expected_outputs, from_pretrained, outputs


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "vit", "bart", "t5"])
def test_a_dense_export_loads_with_stock_transformers_and_weighs_what_the_base_does(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    weights = compress_all(base)
    dense = {name: weight.to_dense() for name, weight in weights.items()}
    allocation = Allocation.of({name: weight.scheme for name, weight in weights.items()})
    manifest = write_dense(base, dense, allocation, tmp_path / "out", claim={"storage_bytes": 5})
    expected = expected_outputs(base, weights, family)
    plain = from_pretrained(base, tmp_path / "out")
    assert torch.equal(outputs(plain, family), expected)
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(outputs(load(tmp_path / "out"), family), expected)
    assert manifest.storage_bytes == stored_bytes(tmp_path / "out") == base.layout.base_bytes


def test_a_dense_export_says_that_it_is_simulated(base: BaseModel, tmp_path: Path) -> None:
    write_dense(base, {}, Allocation(), tmp_path / "out", claim={})
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.checkpoint_format == "dense"
    assert manifest.simulated


def test_a_matrix_of_another_shape_is_refused_and_nothing_is_written(
    base: BaseModel, tmp_path: Path
) -> None:
    name = base.layout.layers[1].name
    with pytest.raises(ModelError):
        write_dense(base, {name: torch.zeros(3, 3)}, Allocation(), tmp_path / "out", claim={})
    assert list(tmp_path.iterdir()) == []
