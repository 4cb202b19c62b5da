import pytest
import torch

from autocompress.core.scheme import Scheme, Stage
from autocompress.methods import METHODS, LayerProblem, LayerStatistics, compress, footprint
from autocompress.methods.awq import lowest, scales_of
from autocompress.methods.problem import DAMPING, inverse_cholesky_upper
from autocompress.methods.scaling import scaled
from autocompress.testing.method_contract import example_layer

SHAPES = [(36, 90), (88, 37), (64, 96)]
AWQ = METHODS["awq"]
OPTIONS = AWQ.read_options(Stage("awq"))


def problem_of(shape):
    layer = example_layer(*shape)
    return LayerProblem(layer.weight, layer.statistics)


def compressed_of(problem, text):
    scheme = Scheme.parse(text)
    return compress(problem.weight, scheme, problem.statistics, problem=problem)


def loss_of(problem, text):
    return problem.loss(compressed_of(problem, text).to_dense())


def naive_scales(hessian, alpha):
    squares = hessian.diagonal()
    sizes = (squares + DAMPING * squares.mean()).sqrt() ** alpha
    return (sizes / (sizes.max() * sizes.min()).sqrt()).half()


def naive_losses(problem, text, n):
    """Of every candidate, in a problem of its own that is scaled entry by entry."""
    losses = []
    for step in range(n):
        scales = naive_scales(problem.hessian, step / n).float()
        unscale = torch.diag(1 / scales)
        hessian = unscale @ problem.hessian @ unscale
        statistics = LayerStatistics(hessian, problem.n_tokens, "scaled")
        weight = problem.weight @ torch.diag(scales)
        dense = compress(weight, Scheme.parse(text), statistics).to_dense()
        losses.append(problem.loss(dense @ unscale))
    return losses


@pytest.mark.parametrize("shape", SHAPES)
def test_the_search_is_nearly_as_good_as_trying_every_candidate(shape):
    problem = problem_of(shape)
    losses = naive_losses(problem, "rtn(bits=3)", 20)
    assert loss_of(problem, "awq+rtn(bits=3)") <= 1.02 * min(losses)
    stored = compressed_of(problem, "awq+rtn(bits=3)").tensors["t.scales"]
    candidates = [naive_scales(problem.hessian, step / 20) for step in range(20)]
    assert sum(torch.equal(stored, candidate) for candidate in candidates) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_scaling_adds_to_error_compensation_where_inputs_are_loud(shape):
    problem = problem_of(shape)
    for grid in ("bits=3", "bits=4,group_size=32"):
        scaled_loss, plain_loss = (loss_of(problem, f"{t}gptq({grid})") for t in ("awq+", ""))
        assert scaled_loss < 0.9 * plain_loss


@pytest.mark.parametrize(
    "rest",
    ["rtn(bits=2)", "gptq(bits=8)", "wanda", "svd_llm(rank=8)", "svd(rank=8)+rtn", "gptq+eora"],
)
def test_it_is_never_worse_than_no_scaling(rest):
    problem = problem_of((36, 90))
    assert loss_of(problem, f"awq(search=5)+{rest}") <= 1.0001 * loss_of(problem, rest)


def test_alpha_zero_is_the_layer_itself():
    problem = problem_of((36, 90))
    scales = scales_of(problem, 0.0)
    assert torch.equal(scales, torch.ones(90, dtype=torch.float16))
    assert scaled(problem, scales) is problem


def test_the_scaled_problem_has_the_statistics_of_scaled_inputs():
    problem = problem_of((36, 90))
    scales = scales_of(problem, 0.5)
    moved = scaled(problem, scales)
    unscale = torch.diag(1 / scales.double())
    expected = unscale @ problem.hessian.double() @ unscale
    torch.testing.assert_close(moved.hessian.double(), expected, rtol=1e-5, atol=1e-9)
    inputs = torch.randn(12, 90)
    stored = {"scales": scales}
    outputs = AWQ.inputs(inputs, stored, OPTIONS) @ moved.weight.T
    torch.testing.assert_close(outputs, inputs @ problem.weight.T, rtol=0, atol=1e-5)
    back = AWQ.inputs_back(AWQ.inputs(inputs, stored, OPTIONS), stored, OPTIONS)
    torch.testing.assert_close(back, inputs, rtol=1e-6, atol=0)


def test_one_inverse_factor_serves_every_candidate():
    problem = problem_of((36, 90))
    scales = scales_of(problem, 0.4)
    moved = scaled(problem, scales).with_weight(torch.randn(36, 90))
    factor = moved.inverse_factor(by_activation=True, damping=0.01)
    damped = problem.hessian.double() + factor.ridge * torch.eye(90, dtype=torch.float64)
    expected = (damped / torch.outer(scales.double(), scales.double()))[factor.order][
        :, factor.order
    ]
    upper = inverse_cholesky_upper(expected, 0.0).float()
    torch.testing.assert_close(factor.upper, upper, rtol=0, atol=1e-4 * float(upper.abs().max()))
    loss_of(problem, "awq+gptq(bits=3)")
    assert list(problem._factors) == [(True, 0.01, 1)]


@pytest.mark.parametrize("n", [2, 3, 5, 20, 64])
def test_the_floor_of_a_valley_is_found(n):
    for floor in range(n):
        for left, right in ((1.0, 1.0), (0.1, 3.0), (3.0, 0.1)):
            tried = set()

            def loss(step, floor=floor, left=left, right=right, tried=tried):
                tried.add(step)
                return left * max(0, floor - step) + right * max(0, step - floor)

            assert lowest(loss, n, max(1, n // 5)) == floor
            assert n != 20 or floor > 8 or len(tried) <= 9


def test_where_there_is_no_valley_it_still_never_climbs():
    for seed in range(20):
        losses = torch.rand(20, generator=torch.Generator().manual_seed(seed)).tolist()
        assert losses[lowest(losses.__getitem__, 20, 4)] <= losses[0]


def test_it_stores_sixteen_bits_and_multiplies_once_per_input():
    layer = example_layer(36, 90).spec
    plain, moved = (footprint(layer, Scheme.parse(f"{t}gptq(bits=3)")) for t in ("", "awq+"))
    assert moved.storage_bytes == plain.storage_bytes + 2 * 90
    assert moved.macs_per_token == plain.macs_per_token + 90


def test_without_statistics_nothing_is_scaled_and_it_says_so():
    weight = torch.randn(8, 24)
    moved = compress(weight, Scheme.parse("awq+rtn(bits=3)"), LayerStatistics.none())
    plain = compress(weight, Scheme.parse("rtn(bits=3)"), LayerStatistics.none())
    assert torch.equal(moved.to_dense(), plain.to_dense())
    assert moved.notes == ("awq scaled nothing: the layer has no calibration statistics",)


def test_dead_inputs_and_a_dead_layer_are_scaled_finitely():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(16) * 4
    hessian[5, 5] = 0  # a clip may cut what only a dead input multiplies
    for dead in (hessian, torch.zeros(16, 16)):
        compressed = compress(
            weight, Scheme.parse("awq+rtn(bits=8)"), LayerStatistics(dead, 64, "")
        )
        torch.testing.assert_close(compressed.to_dense(), weight, rtol=0, atol=0.1)
