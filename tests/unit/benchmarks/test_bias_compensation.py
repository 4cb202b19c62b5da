from __future__ import annotations

import bias_compensation as bench
import pytest
import torch

from autocompress.core import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress


def inputs():
    """Tokens (400, 12) whose means are not zero, and are not alike."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(400, 12, generator=generator).double() + torch.linspace(-1, 2, 12)


def reader(n_units=12):
    x = inputs()
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double()
    return bench.Reader(weight, x.T @ x / len(x), x.mean(0), n_units)


def loss(of, narrow, *, biased):
    """Of the outputs, token by token."""
    error = inputs() @ (of.weight - narrow).T
    if biased:
        error = error - (of.weight - narrow) @ of.mean
    return float(error.square().sum(1).mean())


@pytest.mark.parametrize("n_units", [12, 4])
def test_without_a_bias_it_is_what_the_method_does(n_units):
    of = reader(n_units)
    narrow, biased = bench.VARIANTS["ziplm"](of, n_units // 2)
    statistics = LayerStatistics(of.hessian.float(), 400, "x")
    scheme = Scheme.parse(f"ziplm(keep={n_units // 2},of={n_units})")
    stored = compress(of.weight.float(), scheme, statistics)
    torch.testing.assert_close(narrow.float(), stored.to_dense(), rtol=1e-4, atol=1e-4)
    assert not biased
    problem = LayerProblem(of.weight.float(), statistics)
    assert loss(of, narrow, biased=False) == pytest.approx(
        float(problem.loss(narrow.float())), rel=1e-3
    )


def test_a_bias_in_the_refit_is_least_squares_with_a_constant_input():
    of = reader()
    kept = of.removed(6, centred=False)
    narrow = of.refitted(kept, of.covariance)
    x = torch.cat([inputs()[:, kept], torch.ones(400, 1).double()], 1)
    exact = torch.linalg.lstsq(x, inputs() @ of.weight.T).solution
    torch.testing.assert_close(narrow[:, kept], exact[:6].T, rtol=0.05, atol=0.05)  # damped
    bias = (of.weight - narrow) @ of.mean
    torch.testing.assert_close(bias, exact[6], rtol=0.05, atol=0.1)
    without = of.refitted(kept, of.hessian)
    assert loss(of, narrow, biased=True) < loss(of, without, biased=False)


def test_flap_keeps_what_varies_and_wanda_what_is_large():
    of = reader()
    large, unbiased = bench.VARIANTS["wanda_sp"](of, 6)
    varying, biased = bench.VARIANTS["flap"](of, 6)
    assert (unbiased, biased) == (False, True)
    spread = of.weight.square().sum(0) * inputs().var(0, unbiased=False)
    assert set((varying.abs().sum(0) > 0).nonzero().view(-1).tolist()) == set(
        spread.topk(6).indices.tolist()
    )
    assert not torch.equal(large, varying)
    assert loss(of, varying, biased=True) < loss(of, large, biased=False)
