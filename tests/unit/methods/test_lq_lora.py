import pytest
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, canonical, compress, strongest
from autocompress.testing.method_contract import example_layer

SHAPES = [(36, 90), (88, 37), (40, 64)]


def problem_of(shape, n_tokens=512):
    layer = example_layer(*shape, n_tokens=n_tokens)
    return LayerProblem(layer.weight, layer.statistics)


def dense_of(problem, text):
    return compress(problem.weight, Scheme.parse(text), problem.statistics).to_dense()


def naive_turns(problem, base, rank, n):
    """Losses of the first n + 1 turns, with the whitened decomposition by Cholesky."""
    weight, losses = problem.weight, []
    ridge = 1e-6 * problem.hessian.diagonal().mean() * torch.eye(weight.shape[1])
    lower = torch.linalg.cholesky((problem.hessian + ridge).double())
    part = torch.zeros_like(weight)
    for _ in range(n + 1):
        matrix = compress(weight - part, Scheme.parse(base), problem.statistics).to_dense()
        left, sizes, right = torch.linalg.svd((weight - matrix).double() @ lower)
        truncated = left[:, :rank] @ torch.diag(sizes[:rank]) @ right[:rank]
        part = torch.linalg.solve_triangular(lower, truncated, upper=False, left=False).float()
        losses.append(problem.loss(matrix + part))
    return losses


@pytest.mark.parametrize("base", ["rtn(bits=3)", "gptq(bits=3)"])
def test_it_goes_down_as_the_naive_alternation_does(base):
    problem = problem_of((40, 64))
    losses = naive_turns(problem, base, 8, 3)
    assert losses == sorted(losses, reverse=True)  # else the example shows nothing
    found = problem.loss(dense_of(problem, f"{base}+lq_lora(rank=8,iterations=3)"))
    # Which side of a boundary a weight falls on depends on the last digits of earlier turns.
    assert found == pytest.approx(losses[-1], rel=0.05)
    first = problem.loss(dense_of(problem, f"{base}+eora(rank=8)"))
    assert first == pytest.approx(losses[0], rel=0.01)
    assert found < 0.9 * first


@pytest.mark.parametrize("rest", ["rank=4", "rank=8,bits=4", "rank=30,bits=8"])
@pytest.mark.parametrize(
    "base", ["gptq(bits=2)", "rtn(bits=8)", "wanda+rtn", "svd(rank=8)+rtn", "hadamard+gptq(bits=3)"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_never_loses_more_than_eora(shape, base, rest):
    problem = problem_of(shape)
    losses = [
        problem.loss(dense_of(problem, f"{base}+{method}({rest})"))
        for method in ("lq_lora", "eora")
    ]
    assert losses[0] <= 1.0001 * losses[1]


def test_more_turns_never_lose_more():
    problem = problem_of((36, 90))
    losses = [
        problem.loss(dense_of(problem, f"gptq(bits=2)+lq_lora(rank=8,iterations={n})"))
        for n in (1, 2, 4, 8, 16)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_without_statistics_the_plain_error_judges_and_it_says_so():
    problem, statistics = problem_of((40, 64)), LayerStatistics.none()
    found = [
        compress(problem.weight, Scheme.parse(f"rtn(bits=3)+{method}(rank=8)"), statistics)
        for method in ("lq_lora", "eora")
    ]
    assert found[0].notes[-1].startswith("lq_lora used the plain decomposition: ")
    errors = [float((c.to_dense() - problem.weight).square().sum()) for c in found]
    assert errors[0] < errors[1]


def test_where_nothing_is_wrong_the_first_turn_stays():
    weight = torch.zeros(8, 16)
    compressed = compress(weight, Scheme.parse("rtn+lq_lora(rank=2)"), LayerStatistics.none())
    assert torch.equal(compressed.to_dense(), weight)


def test_eora_gives_way_to_it_at_the_same_bytes():
    layer = example_layer(36, 90).spec
    found = strongest(layer, Scheme.parse("gptq(bits=3)+eora(rank=4,bits=8)"))
    assert found == canonical(Scheme.parse("quantease(bits=3)+lq_lora(rank=4,bits=8)"))
