"""Predicted damages corrected by slopes: what options do to the very tokens that trials see.

``f_r H`` ranks the options of one layer well and misses by a factor that its role mostly decides:
cross terms between outputs (queries and keys do several times the damage that it says) and errors
that are smaller on the calibration tokens that a method fitted than on others. Slopes on search
tokens have neither fault, and the noise of few samples. So the logarithm of the ratio of the two is
shrunk towards its mean over alike options, by the share of noise in its spread (empirical Bayes:
Efron and Morris, Data analysis using Stein's estimator, JASA 70, 1975).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.core import Scheme
from autocompress.models.slopes import ErrorsOf, Slopes
from autocompress.search.option_table import Floats

ENOUGH_SAMPLES = 64
"""Sequences times draws of their labels; they leave a relative error of about 0.18."""

MOST_DRAWS = 4  # each costs about three forwards of the search tokens

_LEAST_VARIANCE = 0.05  # weights of a group's mean hardly differ below the spread of its members


@dataclass(frozen=True, slots=True)
class Probe:
    """How slopes are measured.

    Attributes:
        measure: slopes along the errors of layers; takes their numbers and what makes them. None
            if that did not work out.
        key: of all that the slopes depend on besides model, options and bank.
    """

    measure: Callable[[Mapping[str, int], ErrorsOf], Slopes | None]
    key: str


def draws_of(n_sequences: int) -> int:
    """Draws of labels for each of so many sequences."""
    return min(MOST_DRAWS, max(1, -(-ENOUGH_SAMPLES // max(1, n_sequences))))


def group_of(role: str, schemes: Sequence[Scheme]) -> Hashable:
    """Options that err alike: the same methods on layers of the same role."""
    return role, tuple(stage.method for stage in schemes[0].stages)


def corrected(
    predicted: Floats, slopes: Floats, n_units: int, groups: Sequence[Hashable]
) -> Floats:
    """Damages by slopes, shrunk towards predicted ones times the ratio of their group.

    An option that nothing is predicted for, or along which nothing changes, stays as it is.

    Args:
        predicted: of each option, (n,).
        slopes: along its error, (samples, n), two samples or more.
        n_units: what damages are averaged over, summed over the samples.
        groups: of each option.

    Returns:
        (n,) in the unit of `predicted`.
    """
    squares = slopes**2
    measured = 0.5 * squares.sum(0) / n_units
    valid = (predicted > 0) & (measured > 0) & np.isfinite(predicted) & np.isfinite(measured)
    result = predicted.copy()
    for group in dict.fromkeys(groups):
        members = np.array([g == group for g in groups]) & valid
        if members.any():
            ratio = np.log(measured[members] / predicted[members])
            result[members] *= np.exp(_shrunk(ratio, _variances(squares[:, members])))
    return result


def _variances(squares: Floats) -> Floats:
    """Variance of the logarithm of the mean of each column, to first order."""
    variances: Floats = squares.var(0, ddof=1) / (len(squares) * squares.mean(0) ** 2)
    return variances


def _shrunk(values: Floats, variances: Floats) -> Floats:
    """Noisy values of one group, drawn to its mean by the share of the noise in their spread."""
    mean = np.average(values, weights=1 / (variances + _LEAST_VARIANCE))
    spread = max(0.0, float(values.var() - variances.mean()))
    trust = spread / (spread + variances) if spread else np.zeros_like(variances)
    shrunk: Floats = mean + trust * (values - mean)
    return shrunk
