import pytest
import torch
from layers import loss_of, problem_of

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress
from autocompress.methods.gptq import compensate_pruned, sweep
from autocompress.methods.grid import GridOptions, best_grid
from autocompress.methods.problem import InverseFactor, inverse_cholesky_upper
from autocompress.testing.method_contract import example_layer


def naive_gptq(weight, mask, grid, factor):
    """Row by row, input by input, in float64, with the whole inverse factor at every step."""
    width = grid.options.width(weight.shape[1])
    upper, order = factor.upper.double(), factor.order.tolist()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    errors = torch.zeros(weight.shape, dtype=torch.float64)
    for i in range(weight.shape[0]):
        row = weight[i, order].double()
        for k, j in enumerate(order):
            scale = float(grid.scales[i, j // width])
            zero = grid.options.offset if grid.zeros is None else int(grid.zeros[i, j // width])
            code = round(float(row[k]) / scale) + zero
            code = min(max(code, 0), grid.options.n_levels - 1)
            if mask is not None and not mask[i, j]:
                code = zero
            codes[i, j] = code
            errors[i, k] = (row[k] - (code - zero) * scale) / upper[k, k]
            row[k + 1 :] -= errors[i, k] * upper[k, k + 1 :]
    return codes, errors


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_activation", [False, True])
def test_the_sweep_matches_the_naive_one(symmetric, masked, by_activation):
    problem = problem_of(5, 70)
    weight = problem.weight
    mask = torch.rand(5, 70, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    grid = best_grid(weight, problem.importance, GridOptions(4, 16, symmetric))
    factor = problem.inverse_factor(by_activation=by_activation, damping=0.01)
    codes = sweep(weight, mask, grid, factor)
    expected, _ = naive_gptq(weight, mask, grid, factor)
    # A weight within float32 rounding of a boundary may fall to either side.
    assert (codes != expected).float().mean() < 0.01


@pytest.mark.parametrize("masked", [False, True])
def test_the_sum_of_squared_errors_is_the_damped_loss(masked):
    problem = problem_of(6, 40)
    weight = problem.weight.double()
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(4)) < 0.5 if masked else None
    factor = problem.inverse_factor(by_activation=True, damping=0.01)
    hessian = problem.hessian.double() + factor.ridge * torch.eye(40, dtype=torch.float64)
    exact = inverse_cholesky_upper(hessian[factor.order][:, factor.order], 0.0)
    factor = InverseFactor(exact, factor.order, factor.ridge, factor.damping)
    grid = best_grid(problem.weight, problem.importance, GridOptions(3, 8, False))
    codes, errors = naive_gptq(weight, mask, grid, factor)
    difference = grid.dense(codes).double() - weight
    loss = (difference @ hessian * difference).sum()
    torch.testing.assert_close(errors.square().sum(), loss, rtol=1e-9, atol=0)


def test_the_factor_inverts_the_damped_hessian_and_is_its_upper_cholesky_factor():
    hessian = problem_of(2, 50).hessian.double()
    damped = hessian + 0.3 * torch.eye(50, dtype=torch.float64)
    upper = inverse_cholesky_upper(hessian, 0.3)
    identity = torch.eye(50, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper @ damped, identity, rtol=0, atol=1e-9)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(upper, expected, rtol=1e-8, atol=1e-10)


def test_weights_on_the_grid_are_left_alone():
    problem = problem_of(4, 32)
    grid = best_grid(problem.weight, problem.importance, GridOptions(4, 0, True))
    on_grid = grid.dense(grid.codes(problem.weight))
    factor = problem.inverse_factor(by_activation=True, damping=0.01)
    assert torch.equal(grid.dense(sweep(on_grid, None, grid, factor)), on_grid)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(48, 64), (64, 96), (96, 33)])
def test_gptq_loses_no_more_than_round_to_nearest(bits, shape):
    problem = problem_of(*shape)
    for group_size in (0, 32):
        options = f"bits={bits},group_size={group_size}"
        assert loss_of(problem, f"gptq({options})") < loss_of(problem, f"rtn({options})")


def test_quantizing_loud_inputs_first_helps():
    layer = example_layer(64, 96)
    problem = LayerProblem(layer.weight, layer.statistics)
    assert loss_of(problem, "gptq(bits=3)") < loss_of(problem, "gptq(bits=3,actorder=false)")


@pytest.mark.parametrize("sparsifier", ["magnitude", "wanda"])
def test_the_joint_sweep_beats_rounding_the_pruned_weight_and_keeps_its_zeros(sparsifier):
    problem = problem_of(32, 64)
    for symmetric in ("true", "false"):
        joint = f"{sparsifier}+gptq(bits=8,symmetric={symmetric})"
        assert loss_of(problem, joint) < 0.9 * loss_of(problem, f"{sparsifier}+rtn(bits=8)")
        pruned = compress(problem.weight, Scheme.parse(sparsifier), problem.statistics)
        dense = compress(problem.weight, Scheme.parse(joint), problem.statistics).to_dense()
        assert (dense[pruned.to_dense() == 0] == 0).all()


def test_the_grid_of_a_pruned_weight_fits_what_compensation_makes_of_it():
    problem = problem_of(32, 64)
    mask = torch.rand(32, 64, generator=torch.Generator().manual_seed(5)) < 0.4
    factor = problem.inverse_factor(by_activation=True, damping=0.01)
    values = compensate_pruned(problem.weight, mask, factor)
    assert (values[~mask] == 0).all()
    assert problem.loss(values) < problem.loss(problem.weight * mask)
    losses = []
    for shown in (values, problem.weight * mask):
        grid = best_grid(shown, problem.importance, GridOptions(4, 0, True))
        losses.append(problem.loss(grid.dense(sweep(problem.weight, mask, grid, factor))))
    assert losses[0] < losses[1]


def test_no_statistics_fall_back_to_rounding_and_say_so():
    compressed = compress(torch.randn(8, 16), Scheme.parse("gptq"), LayerStatistics.none())
    assert compressed.notes == ("gptq rounded to nearest: the layer has no calibration statistics",)


def test_any_tokens_leave_no_note():
    problem = problem_of(16, 64, n_tokens=16)
    assert compress(problem.weight, Scheme.parse("gptq"), problem.statistics).notes == ()


def test_a_hessian_that_is_slightly_indefinite_raises_damping_and_says_so():
    hessian = torch.eye(16)
    hessian[0, 0] = -0.05
    statistics = LayerStatistics(hessian, 100, "x")
    compressed = compress(torch.randn(8, 16), Scheme.parse("gptq"), statistics)
    assert compressed.notes == ("gptq raised damping to 0.1: H is not positive definite",)


def test_a_hopeless_hessian_falls_back_to_rounding_and_says_so():
    hessian = torch.eye(16)
    hessian[0, 0] = -5.0
    statistics = LayerStatistics(hessian, 100, "x")
    compressed = compress(torch.randn(8, 16), Scheme.parse("gptq"), statistics)
    assert compressed.notes == (
        "gptq rounded to nearest: H has no Cholesky factor at any damping up to 1",
    )


def test_one_inverse_factor_serves_every_bit_width():
    problem = problem_of(8, 24)
    first = problem.inverse_factor(by_activation=True, damping=0.01)
    loss_of(problem, "gptq(bits=3)")
    loss_of(problem, "gptq(bits=4)")
    assert problem.inverse_factor(by_activation=True, damping=0.01) is first


def test_dead_inputs_and_a_dead_layer_are_rounded():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(16)
    hessian[5, 5] = 0
    for dead in (hessian, torch.zeros(16, 16)):
        compressed = compress(weight, Scheme.parse("gptq(bits=8)"), LayerStatistics(dead, 64, "x"))
        torch.testing.assert_close(compressed.to_dense(), weight, rtol=0, atol=0.1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_are_swept_a_few_at_a_time(monkeypatch, symmetric, masked):
    problem = problem_of(37, 32)
    mask = problem.weight > 0 if masked else None
    grid = best_grid(problem.weight, problem.importance, GridOptions(3, 16, symmetric))
    factor = problem.inverse_factor(by_activation=True, damping=0.01)
    expected = sweep(problem.weight, mask, grid, factor)
    monkeypatch.setattr("autocompress.methods.gptq._ROWS_AT_ONCE", 10)
    assert torch.equal(sweep(problem.weight, mask, grid, factor), expected)


@pytest.mark.parametrize("method", ["quantease", "autoround"])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_what_starts_from_it_is_refined_a_few_rows_at_a_time(monkeypatch, method, symmetric):
    problem = problem_of(37, 32)
    scheme = Scheme.parse(f"{method}(bits=3,group_size=16,symmetric={symmetric})")
    expected = compress(problem.weight, scheme, problem.statistics).to_dense()
    monkeypatch.setattr("autocompress.methods.gptq._ROWS_AT_ONCE", 10)
    found = compress(problem.weight, scheme, problem.statistics).to_dense()
    assert torch.equal(found, expected)
