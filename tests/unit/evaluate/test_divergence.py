from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.evaluate.divergence import BaseRows, keep_base, score

VOCABULARY = 40


def rows(seed: int, n: int = 6, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, VOCABULARY, generator=generator)


def naive_kl(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    p, q = base.double().softmax(1), model.double().softmax(1)
    return (p * (p / q).log()).sum(1)


TARGETS = torch.tensor([0, 3, 7, 7, 39, 20])


def compare(base: torch.Tensor, model: torch.Tensor, k: int):
    return score(model.clone(), TARGETS, keep_base(base.clone(), TARGETS, k))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 20.0))
def test_divergence_is_exact_when_the_whole_vocabulary_is_kept(seed, scale):
    base, model = rows(seed, scale=scale), rows(seed + 1, scale=scale)
    got = compare(base, model, VOCABULARY).kl
    assert torch.allclose(got.double(), naive_kl(base, model), rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, VOCABULARY - 1), st.floats(0.01, 20.0))
def test_divergence_from_fewer_entries_is_a_lower_bound_that_is_never_negative(seed, k, scale):
    base, model = rows(seed, scale=scale), rows(seed + 1, scale=scale)
    got = compare(base, model, k).kl
    assert bool((got >= 0).all())
    assert bool((got <= naive_kl(base, model) * (1 + 1e-5) + 1e-5).all())


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, VOCABULARY))
def test_the_base_does_not_diverge_from_itself(seed, k):
    base = rows(seed)
    assert float(compare(base, base, k).kl.max()) < 1e-6


def test_more_kept_entries_never_give_a_smaller_divergence():
    base, model = rows(1), rows(2)
    values = [compare(base, model, k).kl for k in (1, 5, 10, 20, 39, 40)]
    for fewer, more in pairwise(values):
        assert bool((more >= fewer - 1e-6).all())


def test_negative_log_likelihood_is_the_cross_entropy():
    base, model = rows(1), rows(2)
    kept = keep_base(base.clone(), TARGETS, 8)
    expected = torch.nn.functional.cross_entropy(base, TARGETS, reduction="none")
    assert torch.allclose(kept.nll, expected, atol=1e-6)
    got = score(model.clone(), TARGETS, kept)
    expected = torch.nn.functional.cross_entropy(model, TARGETS, reduction="none")
    assert torch.allclose(got.nll, expected, atol=1e-6)


def test_agreement_compares_the_most_likely_tokens_and_counts_ties():
    base, model = rows(1), rows(2)
    model[0] = base[0]
    model[1] = 0.0  # every token is the most likely one
    got = compare(base, model, 4).agrees
    expected = (base.argmax(1) == model.argmax(1)).float()
    expected[1] = 1.0
    assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_scores_that_are_not_finite(bad):
    model = rows(2)
    model[0, 5] = bad
    got = compare(rows(1), model, 8)
    assert bool(got.kl[0].isnan())
    assert bool(got.nll[0].isnan())
    assert bool(got.kl[1:].isfinite().all())


def test_ruling_out_what_the_base_allows_costs_infinitely_much():
    base, model = rows(1), rows(2)
    model[0, base[0].argmax()] = -math.inf
    assert float(compare(base, model, 8).kl[0]) == math.inf


def test_entries_that_the_base_rules_out_cost_nothing():
    base = rows(1)
    base[:, 10:] = -math.inf
    got = compare(base, base, 20)
    assert float(got.kl.max()) < 1e-6


def test_kept_values_are_four_bytes_each():
    kept = keep_base(rows(1), TARGETS, 8)
    assert isinstance(kept, BaseRows)
    assert kept.ids.dtype == torch.int32
    assert kept.logprobs.dtype == torch.float32
