import pytest
import torch

from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import METHODS, LayerProblem, LayerStatistics, canonical, compress
from autocompress.methods.obert import SurgeonOptions
from autocompress.testing.method_contract import example_layer


def problem_of(o, d, n_tokens=1024, seed=0):
    """Inputs of which neighbours resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, d, generator=generator)
    inputs = torch.randn(n_tokens, d, generator=generator)
    for j in range(1, d):
        inputs[:, j] += 0.8 * inputs[:, j - 1]
    inputs *= torch.randn(d, generator=generator).mul(0.5).exp()
    return LayerProblem(weight, LayerStatistics(inputs.T @ inputs / n_tokens, n_tokens, "x"))


def loss_of(problem, text):
    compressed = compress(problem.weight, Scheme.parse(text), problem.statistics, problem=problem)
    return problem.loss(compressed.to_dense())


def naive_surgeon(problem, options):
    """Row by row, in float64; refits each block and inverts its survivors' H in each round."""
    weight, hessian = problem.weight.double(), problem.hessian.double().clone()
    hessian.diagonal()[:] = problem.importance.double()
    o, d = weight.shape
    n_kept = max(1, d - round(options.sparsity * d))
    mask, values = torch.ones(o, d, dtype=torch.bool), weight.clone()
    for k in range(1, options.recomputations + 1):
        left = round(d * (n_kept / d) ** (k / options.recomputations))
        for i in range(o):
            cost = torch.full((d,), torch.inf, dtype=torch.float64)
            for start in range(0, d, options.block):
                kept = mask[i, start : start + options.block].nonzero()[:, 0] + start
                inverse = torch.linalg.inv(hessian[kept][:, kept])
                cost[kept] = values[i, kept] ** 2 / (2 * inverse.diagonal())
            doomed = cost.argsort()[: int(mask[i].sum()) - left]
            mask[i, doomed] = False
            for start in range(0, d, options.block):
                own = torch.arange(start, min(start + options.block, d))
                kept = own[mask[i, own]]
                wanted = weight[i, own] @ hessian[own][:, kept]
                values[i, own] = 0
                values[i, kept] = torch.linalg.solve(hessian[kept][:, kept], wanted)
    return mask, values


@pytest.mark.parametrize(
    "options",
    [
        SurgeonOptions(0.5, 16, 1),
        SurgeonOptions(0.8, 16, 8),
        SurgeonOptions(0.9, 10, 3),
        SurgeonOptions(0.6, 200, 4),
        SurgeonOptions(0.7, 1, 1),
    ],
    ids=str,
)
def test_it_matches_the_naive_one(options):
    problem = problem_of(7, 50)  # the last block is ragged
    pruned = METHODS["obs_block"].prune(problem, options)
    mask, values = naive_surgeon(problem, options)
    assert torch.equal(pruned.mask, mask)
    torch.testing.assert_close(pruned.values.double(), values, rtol=1e-3, atol=1e-4)


def test_rows_are_independent_of_the_rows_beside_them(monkeypatch):
    problem, options = problem_of(12, 64), SurgeonOptions(0.7)
    at_once = METHODS["obs_block"].prune(problem, options)
    monkeypatch.setattr("autocompress.methods.obert._ELEMENTS_AT_ONCE", 1)
    row_by_row = METHODS["obs_block"].prune(problem, options)
    assert torch.equal(at_once.mask, row_by_row.mask)
    torch.testing.assert_close(at_once.values, row_by_row.values, rtol=1e-5, atol=1e-6)


def test_blocks_of_one_update_nothing_and_choose_as_wanda_does():
    problem = problem_of(12, 60)
    pruned = METHODS["obs_block"].prune(problem, SurgeonOptions(0.6, block=1))
    assert torch.equal(pruned.values, problem.weight * pruned.mask)
    scores = problem.weight.square() * problem.importance
    for row, kept in zip(scores, pruned.mask, strict=True):
        assert row[kept].min() >= row[~kept].max()


def test_rounds_without_updates_are_one_scheme():
    one, eight = (f"obs_block(block=1,recomputations={n})" for n in (1, 8))
    assert canonical(Scheme.parse(one)) == canonical(Scheme.parse(eight))


@pytest.mark.parametrize("sparsity", [0.8, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_more_recomputations_never_hurt(sparsity, seed):
    problem = problem_of(48, 128, seed=seed)
    losses = [
        loss_of(problem, f"obs_block(sparsity={sparsity},recomputations={n})")
        for n in (1, 2, 4, 8, 16)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.97 * losses[0]


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_it_loses_less_than_magnitude_and_larger_blocks_lose_less(sparsity):
    problem = problem_of(48, 128)
    names = [f"magnitude(sparsity={sparsity})"]
    names += [f"obs_block(sparsity={sparsity},block={block})" for block in (1, 4, 32)]
    losses = [loss_of(problem, name) for name in names]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5, 65)])
@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.999])
def test_the_promised_count_is_the_count_of_the_mask(shape, sparsity):
    options = SurgeonOptions(sparsity)
    zeros = LayerProblem(torch.zeros(shape), problem_of(*shape).statistics)
    mask, _ = METHODS["obs_block"].mask(zeros, options)
    assert int(mask.sum()) == METHODS["obs_block"].n_kept(shape, options)


def test_without_statistics_weights_go_one_by_one_with_a_note():
    problem = LayerProblem(problem_of(8, 128).weight, LayerStatistics.none())
    pruned = METHODS["obs_block"].prune(problem, SurgeonOptions())
    reason = "the layer has no calibration statistics"
    assert pruned.notes == (f"obs_block took weights one by one: {reason}",)
    assert torch.equal(pruned.values, problem.weight * pruned.mask)


def test_a_block_that_is_not_positive_definite_takes_weights_one_by_one_with_a_note():
    layer = example_layer(6, 12)
    hessian = layer.statistics.hessian.clone()
    hessian[0, 1] = hessian[1, 0] = 10 * hessian.diagonal().max()
    problem = LayerProblem(layer.weight, LayerStatistics(hessian, 512, "bad"))
    pruned = METHODS["obs_block"].prune(problem, SurgeonOptions())
    assert pruned.notes == (
        "obs_block took weights one by one: a block of H is not positive definite",
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("block=0", r"block must be 1 to 256, but got 0\. The nearest legal value is 1\."),
        ("recomputations=99", r"recomputations must be 1 to 64, but got 99\. .* value is 64\."),
        ("sparsity=0.0", "sparsity must be above 0"),
    ],
)
def test_bad_options_are_refused_with_a_legal_value(option, message):
    with pytest.raises(SchemeError, match=message):
        canonical(Scheme.parse(f"obs_block({option})"))
