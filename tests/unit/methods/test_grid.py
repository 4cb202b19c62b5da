import pytest
import torch

from autocompress.core.errors import SchemeError
from autocompress.methods.grid import Grid, GridCoding, GridOptions, best_grid, round_to_nearest
from autocompress.methods.problem import LayerProblem, LayerStatistics


def naive_codes(weight, grid):
    """Row by row, weight by weight."""
    options = grid.options
    width = options.width(weight.shape[1])
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            scale = float(grid.scales[i, j // width])
            zero = options.offset if grid.zeros is None else int(grid.zeros[i, j // width])
            level = round(float(weight[i, j]) / scale) + zero
            codes[i, j] = min(max(level, 0), options.n_levels - 1)
    return codes


def naive_dense(codes, grid):
    options = grid.options
    width = options.width(codes.shape[1])
    dense = torch.zeros(codes.shape)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            zero = options.offset if grid.zeros is None else int(grid.zeros[i, j // width])
            dense[i, j] = (int(codes[i, j]) - zero) * float(grid.scales[i, j // width])
    return dense


def exhaustive_error(weight, importance, options):
    """Least weighted error of one group over 2000 scales of both signs and every zero point."""
    low, high = min(weight.min().item(), 0.0), max(weight.max().item(), 0.0)
    widest = max(-low, high, high - low)
    zeros = [options.offset] if options.symmetric else range(options.n_levels)
    scales = torch.linspace(0.15, 2.0, 2000) * widest / (options.n_levels - 1)
    if options.symmetric:
        scales = torch.cat([2 * scales, -2 * scales])
    best = float("inf")
    for zero in zeros:
        levels = (weight / scales[:, None]).round().clamp(-zero, options.n_levels - 1 - zero)
        errors = ((levels * scales[:, None] - weight).square() * importance).sum(1)
        best = min(best, errors.min().item())
    return best


def weighted_error(weight, importance, grid):
    difference = grid.dense(grid.codes(weight)) - weight
    return (difference.square() * importance).sum().item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 0), (3, 8), (4, 12), (8, 5)])
def test_codes_and_values_match_the_naive_ones(bits, group_size, symmetric):
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(bits))
    grid = best_grid(weight, torch.ones(30), GridOptions(bits, group_size, symmetric))
    codes = grid.codes(weight)
    assert torch.equal(codes, naive_codes(weight, grid))
    assert torch.equal(grid.dense(codes), naive_dense(codes, grid))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_clip_search_comes_close_to_an_exhaustive_one(bits, symmetric):
    generator = torch.Generator().manual_seed(0)
    options = GridOptions(bits, 0, symmetric)
    found = best = 0.0
    for _ in range(20):
        weight = torch.randn(1, 48, generator=generator)
        importance = torch.rand(48, generator=generator) * 3 + 0.1
        found += weighted_error(weight, importance, best_grid(weight, importance, options))
        best += exhaustive_error(weight[0], importance, options)
    assert found <= 1.03 * best


@pytest.mark.parametrize("bits", [2, 3])
def test_weighting_the_clip_by_the_inputs_lowers_the_loss_at_few_bits(bits):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 128, generator=generator)
    inputs = torch.randn(1024, 128, generator=generator) * torch.logspace(-1, 1, 128)
    statistics = LayerStatistics(inputs.T @ inputs / 1024, 1024, "x")
    problem = LayerProblem(weight, statistics)
    options = GridOptions(bits, 0, True)
    weighted = round_to_nearest(problem, None, options)
    plain = best_grid(weight, torch.ones(128), options)
    assert problem.loss(
        GridCoding(options).values(weighted.codes, weighted.parameters, (64, 128))
    ) < 0.8 * problem.loss(plain.dense(plain.codes(weight)))


def test_the_last_group_may_be_shorter():
    options = GridOptions(4, 16, True)
    weight = torch.randn(3, 40)
    grid = best_grid(weight, torch.ones(40), options)
    assert grid.scales.shape == (3, 3)
    tail = best_grid(weight[:, 32:].contiguous(), torch.ones(8), options)
    assert torch.equal(grid.scales[:, 2:], tail.scales)


def test_a_group_larger_than_the_row_is_the_row():
    assert GridOptions(4, 128).n_groups(40) == GridOptions(4, 0).n_groups(40) == 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_a_level_of_every_grid_exactly(symmetric):
    weight = torch.rand(16, 32) + 1.0  # all positive, far from zero
    weight[:, ::3] = 0
    grid = best_grid(weight, torch.ones(32), GridOptions(3, 8, symmetric))
    assert (grid.dense(grid.codes(weight))[:, ::3] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 1e4, 1e30])
def test_weights_of_any_size_give_finite_storable_scales(size, symmetric):
    weight = torch.randn(4, 16) * size
    grid = best_grid(weight, torch.ones(16), GridOptions(4, 8, symmetric))
    assert torch.isfinite(grid.scales).all()
    assert (grid.scales != 0).all()
    assert torch.isfinite(grid.dense(grid.codes(weight))).all()


def test_a_symmetric_grid_gives_the_longer_side_the_extra_level():
    # Levels -2..1: with a negative scale 2.0 is level -2.
    weight = torch.tensor([[2.0, -1.0, 1.0, 0.0]])
    grid = best_grid(weight, torch.ones(4), GridOptions(2, 0, True))
    assert float(grid.scales) == -1.0
    assert torch.equal(grid.dense(grid.codes(weight)), weight)


def test_the_stored_scale_is_the_one_that_codes_were_chosen_with():
    weight = torch.tensor([[0.1, 0.2003, -0.30001, 0.40017]])
    grid = best_grid(weight, torch.ones(4), GridOptions(8, 0, True))
    reloaded = Grid(grid.options, grid.scales.clone(), None)
    assert torch.equal(reloaded.codes(weight), grid.codes(weight))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"bits must be 2 to 8, but got 1\. The nearest legal value is 2"),
        ({"bits": 16}, r"bits must be 2 to 8, but got 16\. The nearest legal value is 8"),
        ({"group_size": -1}, r"group_size .* but got -1\. The nearest legal value is 0"),
    ],
)
def test_bad_grid_options_are_refused_with_the_nearest_legal_value(options, message):
    with pytest.raises(SchemeError, match=message):
        GridOptions(**options)
