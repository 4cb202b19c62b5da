import pytest
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress
from autocompress.methods.problem import DAMPING
from autocompress.testing.method_contract import example_layer

SHAPES = [(36, 90), (88, 37), (48, 48)]


def problem_of(shape):
    layer = example_layer(*shape)
    return LayerProblem(layer.weight, layer.statistics)


def dense_of(problem, text):
    scheme = Scheme.parse(text)
    return compress(problem.weight, scheme, problem.statistics, problem=problem).to_dense()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_matches_the_published_algorithm(shape, alpha):
    problem = problem_of(shape)
    squares = problem.hessian.double().diagonal()
    scales = (squares + DAMPING * squares.mean()).sqrt() ** alpha
    left, sizes, right = torch.linalg.svd(problem.weight.double() * scales, full_matrices=False)
    expected = left[:, :9] @ torch.diag(sizes[:9]) @ right[:9] / scales
    dense = dense_of(problem, f"asvd(rank=9,alpha={alpha})").double()
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_lies_between_svd_and_svd_llm(shape, rank):
    problem = problem_of(shape)
    svd_llm, asvd, svd = (
        problem.loss(dense_of(problem, f"{method}(rank={rank})"))
        for method in ("svd_llm", "asvd", "svd")
    )
    assert svd_llm < asvd < svd


def test_alpha_zero_is_svd():
    problem = problem_of((36, 90))
    plain = dense_of(problem, "svd(rank=7)")
    torch.testing.assert_close(dense_of(problem, "asvd(rank=7,alpha=0)"), plain, rtol=0, atol=1e-6)


def test_factors_share_the_sizes_evenly():
    problem = problem_of((36, 90))
    tensors = compress(problem.weight, Scheme.parse("asvd(rank=7)"), problem.statistics).tensors
    outer, inner = tensors["a.values"].norm(dim=0), tensors["b.values"].norm(dim=1)
    torch.testing.assert_close(outer, inner, rtol=1e-4, atol=0)


def test_one_decomposition_serves_every_rank():
    problem = problem_of((36, 90))
    dense_of(problem, "asvd(rank=3)")
    derived = dict(problem._derived)
    dense_of(problem, "asvd(rank=9)+rtn")
    assert len(derived) == 1
    assert problem._derived == derived


def test_without_statistics_it_is_svd_and_says_so():
    weight = torch.randn(20, 40)
    plain = compress(weight, Scheme.parse("svd(rank=5)"), LayerStatistics.none())
    scaled = compress(weight, Scheme.parse("asvd(rank=5)"), LayerStatistics.none())
    assert torch.equal(plain.to_dense(), scaled.to_dense())
    assert scaled.notes == ("asvd did not scale: the layer has no calibration statistics",)
