import pytest
import torch
from layers import loss_of, problem_of

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, compress
from autocompress.methods.autoround import Rounding, learned
from autocompress.methods.gptq import sweep
from autocompress.methods.grid import Grid, GridOptions, best_grid
from autocompress.testing.method_contract import example_layer


def start_of(problem, mask, options):
    """GPTQ's grid and codes."""
    grid = best_grid(problem.weight, problem.importance, options)
    factor = problem.inverse_factor(by_activation=True, damping=0.01)
    return grid, sweep(problem.weight, mask, grid, factor)


def straight_through(exact, rounded):
    return exact + (rounded - exact).detach()


def naive_step(rounding, mask, grid, hessian, step):
    """One step of signed gradient descent by autograd: (offsets, high, low)."""
    weight, options = rounding.weight, grid.options
    width, d = options.width(weight.shape[1]), weight.shape[1]
    of_column = torch.arange(d) // width
    offsets, high, low = (
        p.clone().requires_grad_() for p in (rounding.offsets, rounding.high, rounding.low)
    )
    top = options.n_levels - 1
    first_scales = grid.scales.to(weight.dtype)
    if options.symmetric:
        exact = first_scales * high
        zeros = torch.full_like(first_scales, options.offset)
    else:
        largest = first_scales * (top - grid.zeros.to(weight.dtype))
        smallest = -first_scales * grid.zeros.to(weight.dtype)
        exact = (largest * high - smallest * low) / top
    scales = straight_through(exact, exact.half().to(exact.dtype))
    if not options.symmetric:
        wanted = -smallest * low / scales
        zeros = straight_through(wanted, wanted.round()).clamp(0, top)
    scales, zeros = scales[:, of_column], zeros[:, of_column]
    wanted = weight / scales + zeros + offsets
    codes = straight_through(wanted, wanted.round()).clamp(0, top)
    values = (codes - zeros) * scales
    if mask is not None:
        values = values * mask
    error = values - weight
    (error @ hessian * error).sum().backward()
    moved = [
        p.detach() - step * (torch.zeros_like(p) if p.grad is None else p.grad.sign())
        for p in (offsets, high, low)
    ]
    return [moved[0], *(p.clamp(0.5, 1) for p in moved[1:])]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_is_that_of_autograd(bits, symmetric, masked):
    problem = problem_of(7, 50)
    mask = torch.rand(7, 50, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    grid, codes = start_of(problem, mask, GridOptions(bits, 16, symmetric))
    hessian = problem.hessian.double()
    rounding = Rounding(problem.weight.double(), mask, grid, codes)
    for step in (0.02, 0.01, 0.005):
        expected = naive_step(rounding, mask, grid, hessian, step)
        iterate = rounding.iterate()
        rounding.descend(iterate, (iterate.values - rounding.weight) @ hessian, step)
        found = (rounding.offsets, rounding.high, rounding.low)
        for parameter, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(parameter, wanted, rtol=0, atol=1e-12)
    assert (rounding.high < 1).any()
    assert symmetric or (rounding.low < 1).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 24])
@pytest.mark.parametrize("masked", [False, True])
def test_it_starts_at_the_codes_that_it_was_given(symmetric, group_size, masked):
    problem = problem_of(12, 64)
    mask = torch.rand(12, 64, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    grid, codes = start_of(problem, mask, GridOptions(3, group_size, symmetric))
    assert not torch.equal(codes, grid.codes(problem.weight))
    rounding = Rounding(problem.weight, mask, grid, codes)
    first = rounding.iterate()
    assert torch.equal(first.codes.to(torch.uint8), codes)
    assert torch.equal(first.values, grid.dense(codes))
    nearest = first.codes - (problem.weight / first.scales[:, :1] + first.zeros[:, :1])
    if group_size == 0 and mask is None:
        assert (rounding.offsets[nearest.abs() < 0.49] == 0).all()


def test_parameters_stay_within_their_bounds():
    problem = problem_of(6, 40)
    grid, codes = start_of(problem, None, GridOptions(2, 8, False))
    rounding = Rounding(problem.weight, None, grid, codes)
    first = rounding.offsets.clone()
    for _ in range(8):
        iterate = rounding.iterate()
        rounding.descend(iterate, (iterate.values - rounding.weight) @ problem.hessian, 0.2)
        assert ((rounding.offsets - first).abs() <= 0.5 + 1e-6).all()
        for factors in (rounding.high, rounding.low):
            assert factors.min() >= 0.5
            assert factors.max() <= 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_row_loses_more_than_where_it_started(symmetric):
    problem = problem_of(64, 48)
    grid, codes = start_of(problem, None, GridOptions(2, 16, symmetric))
    hessian = problem.hessian.double()

    def row_losses(found: Grid, of):
        difference = found.dense(of).double() - problem.weight.double()
        return (difference @ hessian * difference).sum(1)

    before = row_losses(grid, codes)
    after = row_losses(*learned(problem, None, grid, codes, 100))
    assert (after <= before).all()
    assert (after < before).float().mean() > 0.5


def test_rows_do_not_depend_on_each_other():
    problem = problem_of(20, 48)
    grid, codes = start_of(problem, None, GridOptions(3, 16, False))
    together = learned(problem, None, grid, codes, 30)
    some = slice(5, 12)
    alone = learned(
        problem.with_weight(problem.weight[some]),
        None,
        Grid(grid.options, grid.scales[some], grid.zeros[some]),
        codes[some],
        30,
    )
    same = (together[1][some] == alone[1]).float().mean()
    assert same > 0.99  # matrix products of other shapes differ in their last digit


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_it_loses_no_more_than_gptq_and_gptq_no_more_than_rounding(bits, symmetric):
    for shape in ((36, 90), (88, 37), (40, 64)):
        layer = example_layer(*shape)
        problem = LayerProblem(layer.weight, layer.statistics)
        options = f"bits={bits},group_size=32,symmetric={symmetric}"
        by_gptq = loss_of(problem, f"gptq({options})")
        assert loss_of(problem, f"autoround({options})") <= by_gptq
        assert by_gptq <= loss_of(problem, f"rtn({options})")


def test_at_two_bits_it_wins():
    problem = problem_of(64, 96)
    assert loss_of(problem, "autoround(bits=2)") < 0.99 * loss_of(problem, "gptq(bits=2)")


@pytest.mark.parametrize("sparsifier", ["wanda", "sparsegpt"])
def test_pruned_weights_stay_zero(sparsifier):
    problem = problem_of(32, 64)
    pruned = compress(problem.weight, Scheme.parse(sparsifier), problem.statistics).to_dense()
    for symmetric in ("true", "false"):
        rest = f"(bits=2,symmetric={symmetric})"
        scheme = Scheme.parse(f"{sparsifier}+autoround{rest}")
        dense = compress(problem.weight, scheme, problem.statistics).to_dense()
        assert (dense[pruned == 0] == 0).all()
        by_gptq = loss_of(problem, f"{sparsifier}+gptq{rest}")
        if sparsifier == "wanda":  # else the target of both is the compensated weight
            assert problem.loss(dense) <= by_gptq


def test_it_stores_what_gptq_stores():
    problem = problem_of(32, 64)
    for options in ("bits=3,group_size=24", "bits=2,group_size=0,symmetric=false"):
        ours, theirs = (
            compress(problem.weight, Scheme.parse(f"{name}({options})"), problem.statistics)
            for name in ("autoround", "gptq")
        )
        assert [(n, t.shape, t.dtype) for n, t in ours.tensors.items()] == [
            (n, t.shape, t.dtype) for n, t in theirs.tensors.items()
        ]
