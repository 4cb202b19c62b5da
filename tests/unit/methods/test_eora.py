import pytest
import torch

from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, check, compress, footprint
from autocompress.testing.method_contract import example_layer

SHAPES = [(36, 90), (88, 37), (40, 64)]


def problem_of(shape, n_tokens=512):
    layer = example_layer(*shape, n_tokens=n_tokens)
    return LayerProblem(layer.weight, layer.statistics)


def dense_of(problem, text):
    scheme = Scheme.parse(text)
    return compress(problem.weight, scheme, problem.statistics, problem=problem).to_dense()


def naive_eora(error, hessian, rank):
    """As published, by eigenvalues of H; directions that no input took are left out."""
    values, vectors = torch.linalg.eigh(hessian.double())
    seen = values > 1e-7 * values[-1]
    root = vectors[:, seen] * values[seen].sqrt()
    left, sizes, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    inverse = (vectors[:, seen] / values[seen].sqrt()).T
    return left[:, :rank] @ torch.diag(sizes[:rank]) @ right[:rank] @ inverse, sizes


def plain_residual(problem, base, rank):
    """Loss with the best correction of the weight itself."""
    left, sizes, right = torch.linalg.svd((problem.weight - base).double(), full_matrices=False)
    correction = left[:, :rank] @ torch.diag(sizes[:rank]) @ right[:rank]
    return problem.loss(base.double() + correction)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_to_the_outputs_what_the_published_algorithm_does(shape):
    problem = problem_of(shape)
    base = dense_of(problem, "rtn(bits=3)")
    expected, sizes = naive_eora(problem.weight - base, problem.hessian, 8)
    found = dense_of(problem, "rtn(bits=3)+eora(rank=8)")
    apart = LayerProblem(base + expected.float(), problem.statistics).loss(found)
    assert apart < 1e-4 * problem.loss(base)
    # What is left is the tail of the squared singular values.
    assert problem.loss(found) == pytest.approx(float(sizes[8:].square().sum()), rel=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_restores_the_weight_up_to_float16(shape):
    problem = problem_of(shape)
    base = dense_of(problem, "gptq(bits=3)")
    restored = dense_of(problem, f"gptq(bits=3)+eora(rank={min(shape)})")
    assert (restored - problem.weight).norm() < 2e-3 * (base - problem.weight).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_more_rank_loses_less_and_no_rank_more_than_the_plain_decomposition(shape):
    problem = problem_of(shape)
    base = dense_of(problem, "rtn(bits=3)")
    losses = [problem.loss(base)]
    for rank in (1, 2, 4, 8, 16, 24):
        losses.append(problem.loss(dense_of(problem, f"rtn(bits=3)+eora(rank={rank})")))
        assert losses[-1] <= 1.001 * plain_residual(problem, base, rank)
    assert losses == sorted(losses, reverse=True)
    assert losses[-2] < 0.8 * plain_residual(problem, base, 16)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_per_weight_are_those_of_the_formula(shape, bits):
    o, d = shape
    layer = example_layer(*shape).spec
    plain = footprint(layer, Scheme.parse("rtn(bits=4)"))
    with_part = footprint(layer, Scheme.parse(f"rtn(bits=4)+eora(rank=8,bits={bits})"))
    scales = 0 if bits == 16 else 8 * (-(-o // 64) + -(-d // 64)) * 16
    added = 8 * (with_part.storage_bytes - plain.storage_bytes) / (o * d)
    assert added == pytest.approx((8 * (o + d) * bits + scales) / (o * d))
    assert with_part.macs_per_token == plain.macs_per_token + 8 * (o + d)


def test_eight_bits_of_the_factors_are_nearly_as_good_as_sixteen():
    problem = problem_of((40, 64))
    losses = [
        problem.loss(dense_of(problem, f"rtn(bits=3)+eora(rank=8,bits={bits})"))
        for bits in (16, 8, 4)
    ]
    assert losses[0] < losses[1] < 1.01 * losses[0]
    assert losses[1] < losses[2] < problem.loss(dense_of(problem, "rtn(bits=3)"))


def test_without_statistics_it_is_the_plain_decomposition_and_says_so():
    problem, statistics = problem_of((40, 64)), LayerStatistics.none()
    compressed = compress(problem.weight, Scheme.parse("rtn(bits=3)+eora(rank=8)"), statistics)
    assert compressed.notes[-1].startswith("eora used the plain decomposition: ")
    base = compress(problem.weight, Scheme.parse("rtn(bits=3)"), statistics).to_dense()
    tail = torch.linalg.svdvals((problem.weight - base).double())[8:].square().sum()
    left = (compressed.to_dense() - problem.weight).square().sum()
    assert float(left) == pytest.approx(float(tail), rel=1e-3)


def test_a_rank_above_the_smaller_side_is_refused():
    layer = example_layer(36, 90).spec
    check(layer, Scheme.parse("rtn+eora(rank=36)"))
    with pytest.raises(SchemeError, match="at most 36, but got 37"):
        check(layer, Scheme.parse("rtn+eora(rank=37)"))
