import math
from hashlib import shake_128

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autocompress.core.scheme import Scheme, Stage
from autocompress.methods import (
    METHODS,
    LayerProblem,
    LayerStatistics,
    compress,
    footprint,
    hadamard,
)
from autocompress.methods.hadamard import rotated, rotated_back
from autocompress.testing.method_contract import example_layer

SIZES = [64, 90, 37, 96]
HADAMARD = METHODS["hadamard"]
OPTIONS = HADAMARD.read_options(Stage.of("hadamard", {"seed": 5}))


def naive_rotation(d, seed):
    """T entry by entry: signs, and the Kronecker product of a cosine and a Hadamard matrix."""
    n = max(2**k for k in range(20) if d % 2**k == 0)
    m = d // n
    stream = shake_128(f"autocompress hadamard {seed}".encode()).digest(-(-d // 8))
    signs = torch.tensor([2 * (stream[j // 8] >> j % 8 & 1) - 1 for j in range(d)])
    walsh = torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.float64
    ) / math.sqrt(n)
    cosines = [
        [math.cos(math.pi / m * (j + 0.5) * k) * math.sqrt((2 if k else 1) / m) for j in range(m)]
        for k in range(m)
    ]
    mixing = torch.kron(torch.tensor(cosines, dtype=torch.float64), walsh)
    return torch.diag(signs.double()) @ mixing


def outlier_layer(o=48, d=64):
    """Weights and inputs with a few large columns."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(o, d, generator=generator)
    weight[:, :3] *= 12
    inputs = torch.randn(1024, d, generator=generator)
    return LayerProblem(weight, LayerStatistics(inputs.T @ inputs / 1024, 1024, "outliers"))


@pytest.mark.parametrize("d", SIZES)
def test_the_rotation_is_the_naive_one_and_orthogonal(d):
    matrix = torch.randn(7, d, dtype=torch.float64)
    naive = naive_rotation(d, 5)
    identity = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(naive @ naive.T, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotated(matrix, 5), matrix @ naive, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotated_back(matrix, 5), matrix @ naive.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", SIZES)
def test_rotating_and_back_changes_nothing(d):
    matrix = torch.randn(9, d)
    torch.testing.assert_close(rotated_back(rotated(matrix, 0), 0), matrix, rtol=0, atol=1e-5)
    assert not torch.allclose(rotated(matrix, 0), rotated(matrix, 1))


@pytest.mark.parametrize("d", SIZES)
def test_the_rotated_problem_has_the_statistics_of_rotated_inputs(d):
    layer = example_layer(24, d)
    problem = LayerProblem(layer.weight, layer.statistics)
    moved = HADAMARD.apply(problem, {}, OPTIONS)
    naive = naive_rotation(d, 5)
    hessian = problem.hessian.double()
    size = float(hessian.diagonal().mean())
    torch.testing.assert_close(
        moved.hessian.double(), naive.T @ hessian @ naive, rtol=0, atol=1e-6 * size * d
    )
    torch.testing.assert_close(
        moved.weight.double(), layer.weight.double() @ naive, rtol=0, atol=1e-6
    )
    assert moved.loss(moved.weight + 0.1) == pytest.approx(
        problem.loss(problem.weight + rotated_back(torch.full((24, d), 0.1), 5)), rel=1e-4
    )
    assert HADAMARD.apply(problem, {}, OPTIONS) is moved  # shared by all that follows


@pytest.mark.parametrize("d", [8, 12])
def test_gradients_pass_through_the_rotation(d):
    matrix = torch.randn(3, d, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: rotated(m, 5), matrix)
    assert torch.autograd.gradcheck(lambda m: rotated_back(m, 5), matrix)


def test_many_rows_are_rotated_like_few(monkeypatch):
    rows = torch.randn(11, 24)
    expected = rotated(rows, 5)
    monkeypatch.setattr(hadamard, "_AT_ONCE", 40)
    assert torch.equal(rotated(rows, 5), expected)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("n", [1, 7])
def test_kernels_rotate_by_two_small_products(d, n):
    rows = torch.randn(2 * n, d)[::2]  # not contiguous
    expected = HADAMARD.inputs(rows, {}, OPTIONS)
    found = HADAMARD.inputs_of_kernels(rows, {}, OPTIONS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.is_contiguous()
    precise = HADAMARD.inputs_of_kernels(rows.double(), {}, OPTIONS)
    torch.testing.assert_close(precise, rows.double() @ naive_rotation(d, 5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", SIZES)
def test_unquantized_outputs_stay_as_they_are(d):
    layer = example_layer(24, d)
    inputs = torch.randn(11, d)
    outputs = inputs @ layer.compress("hadamard(seed=5)").to_dense().T
    torch.testing.assert_close(outputs, inputs @ layer.weight.T, rtol=0, atol=1e-5)
    moved = rotated(layer.weight, 5) @ HADAMARD.inputs(inputs, {}, OPTIONS).T
    torch.testing.assert_close(moved.T, inputs @ layer.weight.T, rtol=0, atol=1e-5)
    back = HADAMARD.inputs_back(HADAMARD.inputs(inputs, {}, OPTIONS), {}, OPTIONS)
    torch.testing.assert_close(back, inputs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantizer", ["rtn(bits=4,group_size=0)", "gptq(bits=3,group_size=0)"])
def test_rotation_helps_a_scale_per_row_where_columns_stand_out(quantizer):
    problem = outlier_layer()
    losses = [
        problem.loss(compress(problem.weight, Scheme.parse(text), problem.statistics).to_dense())
        for text in (f"hadamard+{quantizer}", quantizer)
    ]
    assert losses[0] < 0.7 * losses[1]


def test_nothing_is_stored_for_it_and_additions_count():
    layer = example_layer(24, 96).spec
    plain = footprint(layer, Scheme.parse("rtn(bits=4)"))
    moved = footprint(layer, Scheme.parse("hadamard+rtn(bits=4)"))
    assert moved.tensors == plain.tensors
    assert moved.macs_per_token == plain.macs_per_token + 96 * (5 + 3)  # 96 = 3 x 2^5


def test_without_statistics_the_weight_is_rotated_all_the_same():
    weight = torch.randn(8, 48)
    weight[:, 0] *= 30
    losses = []
    for text in ("hadamard+rtn(bits=4,group_size=0)", "rtn(bits=4,group_size=0)"):
        dense = compress(weight, Scheme.parse(text), LayerStatistics.none()).to_dense()
        losses.append(float((dense - weight).square().sum()))
    assert losses[0] < losses[1]


class Calls(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.n += 1
        return function(*arguments, **(options or {}))


def test_where_calls_count_large_parts_are_turned_at_once():
    with Calls() as few:
        rotated_back(torch.empty(1, 14336, device="meta"), 0)
    with Calls() as many:
        rotated_back(torch.empty(1024, 14336, device="meta"), 0)
    assert many.n < 2 * few.n
