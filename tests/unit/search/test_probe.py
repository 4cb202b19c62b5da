import numpy as np
import pytest

from autocompress.core import Scheme
from autocompress.search.probe import (
    ENOUGH_SAMPLES,
    MOST_DRAWS,
    corrected,
    draws_of,
    group_of,
)


def slopes_of(damages, n_samples, seed=0):
    """Slopes whose half squares have these means in expectation, of one unit per sample."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((n_samples, len(damages))) * np.sqrt(2 * np.array(damages))


def test_draws_fill_up_few_sequences_and_are_bounded():
    assert draws_of(2) == MOST_DRAWS
    assert draws_of(ENOUGH_SAMPLES // 2) == 2
    assert draws_of(ENOUGH_SAMPLES // 2 + 1) == 2
    assert draws_of(ENOUGH_SAMPLES) == draws_of(10 * ENOUGH_SAMPLES) == 1


def test_without_noise_it_is_the_mean_of_half_the_squares():
    predicted = np.array([1.0, 2.0, 5.0])
    squares = np.array([3.0, 1.0, 4.0])
    slopes = np.sqrt(2 * squares) * np.array([[1.0], [-1.0], [1.0]])
    for n_units in (3, 12):
        found = corrected(predicted, slopes, n_units, ["a", "a", "a"])
        np.testing.assert_allclose(found, squares * 3 / n_units, rtol=1e-12)


def test_a_group_within_its_noise_keeps_its_predictions_up_to_one_factor():
    predicted = np.array([1.0, 2.0, 4.0, 10.0, 20.0])
    slopes = slopes_of([3.0, 6.0, 12.0, 1.0, 2.0], n_samples=6)
    # the same draws along alike errors, as those of one layer nearly have
    slopes[:, :3] = slopes[:, :1] * np.sqrt([1.0, 2.0, 4.0])
    slopes[:, 3:] = slopes[:, 3:4] * np.sqrt([1.0, 2.0])
    found = corrected(predicted, slopes, 6, ["a", "a", "a", "b", "b"])
    ratios = found / predicted
    np.testing.assert_allclose(ratios[:3], 0.5 * np.mean(slopes[:, 0] ** 2), rtol=1e-12)
    np.testing.assert_allclose(ratios[3:], 0.5 * np.mean(slopes[:, 3] ** 2) / 10, rtol=1e-12)


@pytest.mark.parametrize("n_samples", [8, 32, 128])
def test_shrinking_is_closer_than_either_alone(n_samples):
    generator = np.random.default_rng(1)
    true = np.exp(generator.normal(0, 2, 200))
    groups = list(generator.integers(4, size=200))
    factors = np.exp([-1.5, -0.5, 0.2, 0.8])[groups] * np.exp(generator.normal(0, 0.3, 200))
    predicted = true * factors
    slopes = slopes_of(true, n_samples)
    error = np.std(np.log(corrected(predicted, slopes, n_samples, groups) / true))
    measured = 0.5 * (slopes**2).mean(0)
    assert error < 0.95 * np.std(np.log(measured / true))
    assert error < 0.95 * np.std(np.log(predicted / true))


def test_what_is_unknown_stays_as_it_was_predicted():
    predicted = np.array([0.0, 7.0, 1e6, np.inf, 1.0])
    slopes = slopes_of([1.0, 1.0, 1.0, 1.0, 1.0], n_samples=50)
    slopes[:, 1] = 0
    slopes[:, 2] = np.nan
    found = corrected(predicted, slopes, 50, ["a"] * 5)
    np.testing.assert_array_equal(found[:4], predicted[:4])
    assert found[4] == pytest.approx(0.5 * (slopes[:, 4] ** 2).mean())


def test_alike_options_are_those_of_one_role_and_method():
    def group(role, text):
        return group_of(role, [Scheme.parse(text)])

    assert group("key", "rtn(bits=2)") == group("key", "rtn(bits=8)")
    assert group("key", "rtn(bits=2)") != group("value", "rtn(bits=2)")
    assert group("key", "rtn(bits=2)") != group("key", "gptq(bits=2)")
    assert group("key", "rtn(bits=2)") != group("key", "magnitude(sparsity=0.5)+rtn(bits=2)")
