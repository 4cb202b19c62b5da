import pytest
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, Needs, canonical, compress, needs
from autocompress.methods.problem import DAMPING
from autocompress.methods.refit import least_squares, refitted
from autocompress.testing.method_contract import example_layer

SPARSIFIERS = ["magnitude", "wanda", "sparsegpt"]


def problem_of(o, d):
    layer = example_layer(o, d)
    return LayerProblem(layer.weight, layer.statistics)


def dense_of(problem, text):
    return compress(
        problem.weight, Scheme.parse(text), problem.statistics, problem=problem
    ).to_dense()


def damped(problem):
    hessian = problem.hessian.double()
    ridge = DAMPING * hessian.diagonal().mean()
    return hessian + ridge * torch.eye(len(hessian), dtype=torch.float64)


def naive_refit(weight, mask, hessian):
    """``(W H)_S H_SS^-1``, row by row."""
    values = torch.zeros_like(weight)
    for i, kept in enumerate(mask):
        wanted = (weight[i] @ hessian)[kept]
        values[i, kept] = torch.linalg.solve(hessian[kept][:, kept], wanted)
    return values


def damped_loss(values, weight, hessian):
    difference = values.double() - weight.double()
    return float(((difference @ hessian) * difference).sum())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_it_is_the_least_squares_solution_of_each_row(share):
    problem = problem_of(20, 60)
    weight, hessian = problem.weight.double(), damped(problem)
    mask = torch.rand(20, 60, generator=torch.Generator().manual_seed(1)) < share
    mask[3], mask[4] = False, True  # nothing and everything is kept
    expected = naive_refit(weight, mask, hessian)
    found = least_squares(weight, mask, hessian, negligible=1e-20)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert (found[~mask] == 0).all()
    assert torch.equal(found[4], weight[4])


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_refitted_weights_lose_as_little_as_the_exact_solution_to_a_thousandth(
    sparsifier, sparsity
):
    problem = problem_of(64, 96)
    dense = dense_of(problem, f"{sparsifier}(sparsity={sparsity},refit=true)")
    weight, hessian = problem.weight.double(), damped(problem)
    best = damped_loss(naive_refit(weight, dense != 0, hessian), weight, hessian)
    assert best * (1 - 1e-5) <= damped_loss(dense, weight, hessian) <= 1.001 * best


def test_chunks_of_rows_change_nothing_but_rounding(monkeypatch):
    problem = problem_of(64, 96)
    mask = torch.rand(64, 96, generator=torch.Generator().manual_seed(2)) < 0.5
    at_once = refitted(problem, mask)
    monkeypatch.setattr("autocompress.methods.refit._ROWS_AT_ONCE", 5 * 96)
    hessian = damped(problem)
    losses = [damped_loss(v, problem.weight, hessian) for v in (at_once, refitted(problem, mask))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
def test_refitting_keeps_the_mask_and_helps(sparsifier):
    problem = problem_of(48, 64)
    plain, refit = (dense_of(problem, f"{sparsifier}(refit={r})") for r in ("false", "true"))
    assert torch.equal(plain != 0, refit != 0)
    assert problem.loss(refit) < 0.95 * problem.loss(plain)


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_refitting_helps_what_is_quantized_afterwards(sparsifier, bits):
    problem = problem_of(48, 64)
    losses = [
        problem.loss(dense_of(problem, f"{sparsifier}(refit={r})+gptq(bits={bits},group_size=0)"))
        for r in ("false", "true")
    ]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
def test_without_statistics_the_weights_stay_as_they_are_and_it_says_so(sparsifier):
    layer, none = example_layer(16, 64), LayerStatistics.none()
    compressed = compress(layer.weight, Scheme.parse(f"{sparsifier}(refit=true)"), none)
    dense = compressed.to_dense()
    assert torch.equal(dense[dense != 0], layer.weight[dense != 0])
    assert "kept weights were not refitted: " in compressed.notes[-1]


def test_refitting_magnitudes_needs_statistics_although_choosing_them_does_not():
    assert needs(Scheme.parse("magnitude")) is Needs.NONE
    assert needs(Scheme.parse("magnitude(refit=true)")) is Needs.HESSIAN
    assert needs(Scheme.parse("wanda(pattern=2:4)+rtn")) is Needs.DIAGONAL


def test_schemes_name_refitting_only_where_it_is_done():
    assert str(canonical(Scheme.parse("wanda(refit=false)"))) == "wanda(sparsity=0.5)"
    assert str(canonical(Scheme.parse("wanda(refit=true)"))) == "wanda(refit=true,sparsity=0.5)"
