import pytest
import torch

from autocompress.core import Scheme
from autocompress.kernels import KERNELS, Runner

from .conftest import SCHEMES, compressed, errors, prepared, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = (64, 256)
SPARSE = ("magnitude(pattern=2:4)", "magnitude(pattern=2:4)+rtn(bits=4,group_size=64)")
ALL = (*SCHEMES, *SPARSE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MUST_RUN = {
    "int4_weight": "rtn(bits=4,group_size=32)",
    "dynamic_int8": "rtn(bits=8,group_size=0)+int_inputs(bits=8)",
    "low_rank": "svd(rank=16)",
    "sparse_2_4": SPARSE[0],
    "tiles": "rtn(bits=5,group_size=48,symmetric=false)",
}


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_on_a_gpu_agree_with_the_decoded_matrix(scheme: str, dtype: torch.dtype) -> None:
    device, weight = torch.device("cuda"), compressed(scheme, SHAPE)
    for name in KERNELS:
        kernel = KERNELS[name]
        if kernel.refusal(SHAPE, weight.scheme, dtype, device):
            continue
        ready = prepared(name, weight, dtype, device)
        for n in (1, 33):
            rows = tokens(n, SHAPE[1]).to(device, dtype)
            got = kernel.apply(rows, ready)
            worst = errors(name, weight, got, rows, ready)
            assert worst <= kernel.tolerance(dtype, device), (name, n, worst)


@pytest.mark.parametrize("name", sorted(MUST_RUN))
def test_the_kernels_made_for_a_gpu_take_their_schemes_there(name: str) -> None:
    scheme = Scheme.parse(MUST_RUN[name])
    assert not KERNELS[name].refusal(SHAPE, scheme, torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("scheme", ["rtn(bits=4,group_size=32)", *SPARSE])
def test_a_runner_on_a_gpu_measures_and_runs(scheme: str) -> None:
    device, weight = torch.device("cuda"), compressed(scheme, SHAPE)
    tensors = {name: tensor.to(device) for name, tensor in weight.tensors.items()}
    run = Runner(weight.scheme, weight.shape, torch.bfloat16, device)
    for n in (1, 64):
        assert run(tensors, tokens(n, SHAPE[1]).to(device, torch.bfloat16)).isfinite().all()
    assert set(run.chosen) == {1, 64}
