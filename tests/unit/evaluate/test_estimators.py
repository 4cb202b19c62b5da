from __future__ import annotations

import math

import pytest
import torch

from autocompress.core import Measurement
from autocompress.evaluate.estimators import affine, exponential, mean, ratio_of_sums


def test_the_error_of_a_mean_is_the_textbook_standard_error():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    got = mean(values)
    assert got.value == pytest.approx(4.0)
    assert got.standard_error == pytest.approx(float(values.std()) / 2)


def test_the_error_of_a_ratio_matches_the_spread_over_repeated_samples():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 60, (4000, 50), generator=generator).double()
    sums = 1.5 * lengths + 6 * torch.randn(4000, 50, generator=generator)
    samples = [ratio_of_sums(a, b) for a, b in zip(sums, lengths, strict=True)]
    spread = float(torch.tensor([s.value for s in samples]).std())
    stated = float(torch.tensor([s.standard_error for s in samples]).mean())
    assert stated == pytest.approx(spread, rel=0.05)


def test_sequences_that_agree_on_the_ratio_leave_no_error():
    lengths = torch.tensor([3.0, 5.0, 11.0])
    assert ratio_of_sums(0.25 * lengths, lengths) == Measurement(0.25, 0.0)


def test_one_sequence_has_an_unknown_error():
    got = mean(torch.tensor([2.0]))
    assert got.value == 2.0
    assert math.isnan(got.standard_error)


def test_nothing_to_average_is_not_a_number():
    assert math.isnan(mean(torch.tensor([])).value)
    assert math.isnan(ratio_of_sums(torch.ones(3), torch.zeros(3)).value)


def test_an_exponential_that_overflows_is_infinite_and_raises_nothing():
    assert exponential(Measurement(1e6, 1.0)).value == math.inf
    assert math.isnan(exponential(Measurement(math.nan, math.nan)).value)


def test_affine_scales_value_and_error():
    assert affine(Measurement(0.9, 0.01), -2.0, 1.0) == Measurement(pytest.approx(-0.8), 0.02)
