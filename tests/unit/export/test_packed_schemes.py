from pathlib import Path

import pytest
import torch

from autocompress.core import Scheme
from autocompress.core.errors import CheckpointError, ModelError, RunDirectoryError
from autocompress.export import load, write_packed
from autocompress.export.tensor_file import read_header, stored_bytes
from autocompress.methods import METHODS, Sharing, footprint
from autocompress.models import BaseModel

from .conftest import SCHEMES, compress_all, expected_outputs, outputs

WIDTHS = tuple(f"rtn(bits={bits},group_size=32)" for bits in range(2, 9))
OTHERS = (
    "gptq(bits=4,group_size=32)",
    "autoround(bits=3,group_size=16,iterations=10)",
    "quantease(bits=2,group_size=32,rounds=1)",
    "svd_llm(rank=8)+gptq(bits=4)",
    "wanda(sparsity=0.5)",
    "sparsegpt(pattern=2:4)+gptq(bits=4)",
    "obs_block(sparsity=0.5,block=8)",
    "cast(dtype=float16)",
    "drop",
    "fp8(format=e5m2)",
    "mxfp4",
    "nvfp4",
    "nf4(group_size=64)",
    "binary(group_size=16)",
    "ternary(group_size=20)",
    "hqq(bits=3)",
    "kmeans(bits=3)",
    "product(block=4,codewords=16)",
    "hadamard+trellis(bits=3)",
    "subgroup(bands=4,average=4.0)",
    "hadamard+rtn(bits=4)",
    "awq(search=4)+rtn(bits=4)",
    "smoothquant+rtn(bits=4)",
    "asvd(rank=8)",
    "rtn(bits=3)+eora(rank=4)",
    "rtn(bits=3)+lq_lora(rank=4,iterations=2)",
    "rtn(bits=3)+outlier_columns(share=0.05)",
    "rtn(bits=3)+outlier_weights(share=0.01)",
    "ziplm(keep=3,of=4)+rtn(bits=4,group_size=32)",
    "wanda_sp(keep=5,of=8)",
    "magnitude_sp(keep=1,of=2)+svd(rank=4)",
)

ROUND_INPUTS = {"int_inputs"}
"""Tested on models, in test_measured_precision.py: an embedding cannot take them."""


@pytest.mark.parametrize("scheme", sorted({*SCHEMES, *WIDTHS, *OTHERS}))
def test_each_scheme_round_trips_on_every_layer_with_the_bytes_of_its_footprint(
    scheme: str, base: BaseModel, tmp_path: Path
) -> None:
    weights = compress_all(base, (scheme,))
    claimed = base.layout.other_bytes + sum(
        footprint(base.layout.layer(name), weight.scheme).storage_bytes
        for name, weight in weights.items()
    )
    write_packed(base, weights, tmp_path / "out", claim={"storage_bytes": claimed})
    assert stored_bytes(tmp_path / "out") == claimed
    got = outputs(load(tmp_path / "out"), "qwen2")
    # Looked-up rows of a factorized embedding are multiplied alone, hence the rounding.
    torch.testing.assert_close(got, expected_outputs(base, weights, "qwen2"), rtol=1e-5, atol=1e-5)


def test_every_registered_method_is_among_the_schemes_tested_here() -> None:
    schemes = map(Scheme.parse, (*SCHEMES, *WIDTHS, *OTHERS))
    tested = {stage.method for scheme in schemes for stage in scheme.stages}
    shared = {name for name in METHODS if isinstance(METHODS[name], Sharing)}
    assert not tested & shared, "these are in test_shared_layers.py"
    assert tested | ROUND_INPUTS | shared == set(METHODS)


def test_a_four_bit_layer_takes_four_bits_per_weight(base: BaseModel, tmp_path: Path) -> None:
    weights = compress_all(base, ("rtn(bits=4,group_size=32)",))
    write_packed(base, weights, tmp_path / "out", claim={})
    entries = read_header(tmp_path / "out" / "model.safetensors")
    for name in weights:
        layer = base.layout.layer(name)
        assert entries[f"{name}.packed"].n_bytes == layer.n_weights // 2


def test_a_claim_of_other_bytes_is_refused_and_nothing_is_written(
    base: BaseModel, weights: dict, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="the search claimed 12"):
        write_packed(base, weights, tmp_path / "out", claim={"storage_bytes": 12})
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_layer_is_refused(base: BaseModel, weights: dict, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no layer 'nowhere'"):
        write_packed(base, {"nowhere": next(iter(weights.values()))}, tmp_path / "out", claim={})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_files_is_refused_and_left_alone(
    base: BaseModel, weights: dict, tmp_path: Path
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="already holds files"):
        write_packed(base, weights, tmp_path, claim={})
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
