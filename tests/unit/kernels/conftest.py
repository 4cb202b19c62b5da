"""Compressed layers, and what a kernel may differ from their decoded matrix."""

from __future__ import annotations

import shutil
from ctypes import CDLL
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autocompress.core import Scheme
from autocompress.kernels import KERNELS, Prepared
from autocompress.kernels.tiles import in_basis
from autocompress.methods import CompressedWeight, LayerStatistics, compress
from autocompress.methods.schemes import plan
from autocompress.native import build

CPU = torch.device("cpu")
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
SHAPE = (64, 128)

PLAIN = (
    "base",
    "cast(dtype=float16)",
    "magnitude(sparsity=0.7)",
    "magnitude(sparsity=0.7)+cast(dtype=bfloat16)",
)
ROWS = (
    "rtn(bits=8,group_size=0)",
    "rtn(bits=2,group_size=0)",
    "rtn(bits=7,group_size=0,symmetric=false)",
    "magnitude(sparsity=0.6)+rtn(bits=8,group_size=0)",
    "hadamard+rtn(bits=6,group_size=0)",
)
INPUTS = (
    "rtn(bits=8,group_size=0)+int_inputs(bits=8)",
    "rtn(bits=7,group_size=0,symmetric=false)+int_inputs(bits=8)",
    "rtn(bits=8,group_size=0)+int_inputs(bits=7)",
    "rtn(bits=4,group_size=0)+int_inputs(bits=6)",
    "hadamard+rtn(bits=8,group_size=0)+int_inputs(bits=8)",
)
GROUPS = (
    "rtn(bits=4,group_size=32)",
    "rtn(bits=3,group_size=64,symmetric=false)",
    "rtn(bits=4,group_size=0,symmetric=false)",
    "rtn(bits=8,group_size=32)",
    "rtn(bits=6,group_size=64,symmetric=false)",
    "magnitude(sparsity=0.7)+rtn(bits=5,group_size=32,symmetric=false)",
    "magnitude(sparsity=0.7)+rtn(bits=4,group_size=32,symmetric=false)",
    "magnitude(pattern=2:4)+rtn(bits=4,group_size=128)",
    "awq(search=2)+rtn(bits=4,group_size=64)",
)
OTHERS = (
    "rtn(bits=5,group_size=48,symmetric=false)",
    "magnitude(sparsity=0.55)+rtn(bits=3,group_size=24,symmetric=false)",
    "subgroup(bands=4,average=4.0)",
    "nf4(group_size=64)",
    "mxfp4",
    "kmeans(bits=3)",
    "product(block=4,codewords=16)",
    "trellis(bits=3)",
    "hadamard+trellis(bits=4)",
    "binary(group_size=16)",
)
FACTORS = (
    "svd(rank=16)",
    "svd(rank=16)+rtn(bits=8,group_size=0)",
    "svd(rank=8)+wanda(sparsity=0.5)+rtn(bits=2,group_size=16,symmetric=false)",
    "hadamard+svd(rank=16)+rtn(bits=4,group_size=16)",
)
RESIDUALS = (
    "rtn(bits=4,group_size=32)+eora(rank=4)",
    "rtn(bits=3,group_size=24)+lq_lora(rank=3,bits=6,iterations=2)",
    "svd(rank=16)+eora(rank=2)",
    "eora(rank=4)",
    "rtn(bits=4,group_size=0)+outlier_columns(share=0.05)",
    "hadamard+rtn(bits=4)+outlier_weights(share=0.05)",
    "rtn(bits=4)+outlier_weights(share=0.005)",
    "awq(search=2)+rtn(bits=8,group_size=0)+outlier_columns(share=0.05)+int_inputs(bits=6)",
)
SCHEMES = (*PLAIN, *ROWS, *INPUTS, *GROUPS, *OTHERS, *FACTORS, *RESIDUALS)


@lru_cache(maxsize=64)
def compressed(scheme: str, shape: tuple[int, int] = SHAPE) -> CompressedWeight:
    """A layer whose rows differ in size and are not centred, so that zero points matter."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) + 0.5
    weight *= torch.logspace(-2, 1, shape[0])[:, None]
    return compress(weight, Scheme.parse(scheme), LayerStatistics.none())


def tokens(n: int, d: int = SHAPE[1]) -> Tensor:
    """Inputs (n, d) with a loud one."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    rows[:, 3] *= 20
    return rows


def prepared(name: str, weight: CompressedWeight, dtype: torch.dtype, device: torch.device):
    tensors = {key: tensor.to(device) for key, tensor in weight.tensors.items()}
    return KERNELS[name].prepare(tensors, weight.scheme, weight.shape, dtype, device)


def errors(name: str, weight: CompressedWeight, got: Tensor, rows: Tensor, ready: Prepared):
    """Largest error of outputs as a share of what `Kernel.tolerance` counts it against."""
    entered = ready.entered(rows, rounded=True).double().cpu()
    tensors = weight.tensors
    matrix = in_basis(tensors, replace_dtype(ready)).double()
    sizes = matrix.abs()
    if name == "low_rank":
        sizes = factor_sizes(weight)
    elif getattr(getattr(plan(weight.scheme).coding, "options", None), "symmetric", True) is False:
        sizes = sizes.amax(1, keepdim=True).expand_as(sizes)
    bound = (entered.abs() @ sizes.T).clamp(min=1e-30)  # a row may be pruned whole
    return float(((got.double().cpu() - entered @ matrix.T).abs() / bound).max())


def replace_dtype(ready: Prepared):
    """The matrix on the CPU in float32."""
    matrix = ready.matrix
    return type(matrix)(matrix.plan, matrix.shape, torch.float32, CPU)


def factor_sizes(weight: CompressedWeight) -> Tensor:
    """``|A| |B|`` (o, d)."""
    ready = plan(weight.scheme)
    outer, inner = (
        ready.storage(shape).decode(weight.tensors, prefix).double().abs()
        for prefix, shape in ready.matrices(weight.shape).items()
    )
    return outer @ inner


@pytest.fixture(
    scope="session", params=["as this processor is best used", "eight lanes", "portable"]
)
def functions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CDLL:
    """The C kernels, however they are compiled."""
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("compiled")
    if request.param == "portable":
        return build.load(build.compiled(COMPILER, folder, ((),), "-DPORTABLE"))
    narrow = ("-DNARROW",) if request.param == "eight lanes" else ()
    return build.load(build.compiled(COMPILER, folder, build.FLAGS, *narrow))


@pytest.fixture(scope="session")
def native_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the C kernels of this run are kept."""
    return tmp_path_factory.mktemp("native")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native_cache: Path) -> Path:
    """No test reads or writes the user's tables; the C kernels are compiled once for all."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "native").symlink_to(native_cache, target_is_directory=True)
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(cache))
    return cache
