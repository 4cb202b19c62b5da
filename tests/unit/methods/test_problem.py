"""Statistics of few tokens: what a ridge makes of them on tokens that they have not seen."""

import pytest
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerStatistics, compress
from autocompress.methods.problem import LayerProblem

D = 64


def inputs(n_tokens, seed):
    """Correlated, of unequal sizes."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(D, D, generator=generator) * torch.linspace(2, 0.1, D)[:, None]
    generator.manual_seed(seed)
    return torch.randn(n_tokens, D, generator=generator) @ mixing


def moment(n_tokens, seed):
    found = inputs(n_tokens, seed)
    return found.T @ found / n_tokens


def unseen_loss(text, statistics):
    """On other tokens."""
    weight = torch.randn(32, D, generator=torch.Generator().manual_seed(3))
    wrong = compress(weight, Scheme.parse(text), statistics).to_dense() - weight
    return float(((wrong @ moment(8192, 1)) * wrong).sum())


def test_the_ridge_is_a_quarter_of_inputs_over_tokens_of_the_mean():
    hessian = moment(40, 0)
    statistics = LayerStatistics.sampled(hessian, 40, "x")
    problem = LayerProblem(torch.zeros(2, D), statistics)
    expected = hessian + D / (4 * 40) * hessian.diagonal().mean() * torch.eye(D)
    torch.testing.assert_close(problem.hessian, expected)
    assert torch.equal(statistics.hessian, hessian)  # what was gathered stays
    mean = hessian.diagonal().mean()
    torch.testing.assert_close(problem.energies, hessian.diagonal() + mean / 40)


def test_it_vanishes_with_many_tokens_and_is_part_of_the_identity():
    hessian = moment(64, 0)
    found = [LayerStatistics.sampled(hessian, n, "x") for n in (64, 640)]
    assert found[0].ridge == 10 * found[1].ridge > 0
    assert len({s.digest for s in found} | {"x"}) == 3


@pytest.mark.parametrize("hessian", [None, torch.eye(D)])
def test_no_tokens_are_no_statistics(hessian):
    found, none = LayerStatistics.sampled(hessian, 0, "x"), LayerStatistics.none()
    assert (found.hessian, found.n_tokens, found.digest) == (None, 0, none.digest)


@pytest.mark.parametrize(
    "text",
    ["gptq(bits=3)", "quantease(bits=3)", "sparsegpt", "wanda(refit=true)", "svd_llm(rank=16)",
     "rtn(bits=3)+eora(rank=8)"],
)  # fmt: skip
@pytest.mark.parametrize("n_tokens", [2, 32, 64, 256])
def test_with_it_few_tokens_are_better_than_none(text, n_tokens):
    hessian = moment(n_tokens, 0)
    sampled = unseen_loss(text, LayerStatistics.sampled(hessian, n_tokens, "x"))
    none = unseen_loss(text, LayerStatistics.none())
    assert sampled < none if n_tokens >= 32 else sampled < 1.15 * none
    if n_tokens < D:
        assert sampled < unseen_loss(text, LayerStatistics(hessian, n_tokens, "x"))
