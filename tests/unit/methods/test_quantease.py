import itertools

import pytest
import torch
from layers import loss_of, problem_of

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress
from autocompress.methods.gptq import sweep
from autocompress.methods.grid import Grid, GridOptions, best_grid
from autocompress.methods.quantease import Descent
from autocompress.testing.method_contract import example_layer


def start_of(problem, mask, options):
    """GPTQ's grid and codes, and the descent from there."""
    grid = best_grid(problem.weight, problem.importance, options)
    factor = problem.inverse_factor(by_activation=True, damping=0.01)
    damped = problem.hessian + factor.ridge * torch.eye(len(factor.order))
    codes = sweep(problem.weight, mask, grid, factor)
    return grid, codes, Descent(problem, mask, damped, factor.order), damped, factor.order


def some_mask(o, d):
    return torch.rand(o, d, generator=torch.Generator().manual_seed(3)) < 0.6


def row_losses(problem, hessian, grid, codes):
    difference = grid.dense(codes).double() - problem.weight.double()
    return (difference @ hessian.double() * difference).sum(1)


def naive_sweep(weight, mask, grid, codes, hessian, order):
    """Weight by weight: tries every level."""
    width, codes = grid.options.width(weight.shape[1]), codes.clone()
    for i in range(len(weight)):
        for j in order.tolist():
            if mask is not None and not mask[i, j]:
                continue
            scale = grid.scales[i, j // width].double()
            zero = grid.options.offset if grid.zeros is None else int(grid.zeros[i, j // width])
            one = Grid(
                grid.options,
                grid.scales[i : i + 1],
                None if grid.zeros is None else grid.zeros[i : i + 1],
            )
            row = one.dense(codes[i : i + 1]).double()
            trials = row.repeat(grid.options.n_levels, 1)
            trials[:, j] = (torch.arange(grid.options.n_levels) - zero) * scale
            error = trials - weight[i].double()
            codes[i, j] = int((error @ hessian * error).sum(1).argmin())
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_a_sweep_takes_the_best_level_of_each_weight_in_turn(symmetric, masked):
    problem = problem_of(4, 70)
    mask = some_mask(4, 70) if masked else None
    grid, codes, descent, damped, order = start_of(problem, mask, GridOptions(3, 16, symmetric))
    expected = naive_sweep(problem.weight, mask, grid, codes, damped.double(), order)
    assert (expected != codes).float().mean() > 0.02
    # A weight within float32 rounding of a boundary may fall to either side.
    assert (descent.swept(grid, codes) != expected).float().mean() < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_the_least_squares_solution(symmetric):
    problem = problem_of(5, 70)
    grid, codes, descent, damped, _ = start_of(problem, None, GridOptions(3, 16, symmetric))
    root = torch.linalg.cholesky(damped.double()).T  # |root x|^2 = x H x
    zeros = grid.float_zeros.expand(grid.scales.shape)
    for i in range(5):
        levels = codes[i].double() - zeros[i].double().repeat_interleave(16)[:70]
        columns = torch.stack([levels * (torch.arange(70) // 16 == g) for g in range(5)], dim=1)
        exact = torch.linalg.lstsq(root @ columns, root @ problem.weight[i].double()).solution
        found = descent.fitted(grid, codes).scales[i].double()
        torch.testing.assert_close(found, exact, rtol=3e-3, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_neither_a_fit_nor_a_sweep_loses(symmetric, masked):
    problem = problem_of(40, 64)
    mask = some_mask(40, 64) if masked else None
    grid, codes, descent, damped, _ = start_of(problem, mask, GridOptions(3, 16, symmetric))
    losses = [row_losses(problem, damped, grid, codes)]
    grid = descent.fitted(grid, codes)
    losses.append(row_losses(problem, damped, grid, codes))
    for _ in range(3):
        codes = descent.swept(grid, codes)
        losses.append(row_losses(problem, damped, grid, codes))
    for before, after in itertools.pairwise(losses):
        assert (after <= before * 1.001).all()  # scales are rounded to float16
        assert after.sum() <= before.sum()
    assert losses[-1].sum() < losses[0].sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_row_loses_more_than_by_gptq(symmetric):
    problem = problem_of(64, 48)
    grid, codes, descent, _, _ = start_of(problem, None, GridOptions(4, 16, symmetric))
    before = row_losses(problem, problem.hessian, grid, codes)
    losses = [
        row_losses(problem, problem.hessian, *descent.run(grid, codes, rounds))
        for rounds in (1, 2, 4)
    ]
    assert (losses[0] <= before).all()
    assert (losses[1] <= losses[0]).all()
    assert (losses[2] <= losses[1]).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_it_beats_gptq_clearly(bits, symmetric):
    for shape in ((36, 90), (88, 37), (40, 64)):
        layer = example_layer(*shape)
        problem = LayerProblem(layer.weight, layer.statistics)
        options = f"bits={bits},group_size=32,symmetric={symmetric}"
        assert loss_of(problem, f"quantease({options})") < 0.97 * loss_of(
            problem, f"gptq({options})"
        )


def test_it_generalises_to_tokens_that_it_has_not_seen():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    mixing = torch.randn(64, 64, generator=generator)
    seen, unseen = (torch.randn(512, 64, generator=generator) @ mixing for _ in range(2))
    problem = LayerProblem(weight, LayerStatistics(seen.T @ seen / 512, 512, "x"))
    other = LayerProblem(weight, LayerStatistics(unseen.T @ unseen / 512, 512, "y"))
    for bits in (2, 3, 4):
        ours, theirs = (
            compress(weight, Scheme.parse(f"{name}(bits={bits})"), problem.statistics).to_dense()
            for name in ("quantease", "gptq")
        )
        assert other.loss(ours) < other.loss(theirs)


@pytest.mark.parametrize("sparsifier", ["wanda", "sparsegpt"])
def test_pruned_weights_stay_zero(sparsifier):
    problem = problem_of(32, 64)
    pruned = compress(problem.weight, Scheme.parse(sparsifier), problem.statistics).to_dense()
    for symmetric in ("true", "false"):
        scheme = Scheme.parse(f"{sparsifier}+quantease(bits=2,symmetric={symmetric})")
        dense = compress(problem.weight, scheme, problem.statistics).to_dense()
        assert (dense[pruned == 0] == 0).all()
        by_gptq = loss_of(problem, f"{sparsifier}+gptq(bits=2,symmetric={symmetric})")
        assert problem.loss(dense) < by_gptq


def test_dead_inputs_and_a_dead_layer_are_as_gptq_has_them():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(16)
    hessian[5, 5] = 0
    for dead in (hessian, torch.zeros(16, 16)):
        statistics = LayerStatistics(dead, 64, "x")
        dense = compress(weight, Scheme.parse("quantease(bits=8)"), statistics).to_dense()
        torch.testing.assert_close(dense, weight, rtol=0, atol=0.1)
