"""Means, ratios and their standard errors over sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autocompress.core import Measurement


def ratio_of_sums(numerators: Tensor, denominators: Tensor) -> Measurement:
    """``sum(a) / sum(b)`` over sequences, with its standard error by the delta method.

    The variance is that of the linearised residuals ``a_i - R b_i`` (Cochran, Sampling Techniques,
    3rd ed., eq. 6.13), so that it is exactly zero where every sequence agrees on the ratio: for
    paired differences this is what makes the base model's error bar vanish.

    Args:
        numerators: shape ``(n,)``, one value per sequence.
        denominators: shape ``(n,)``.

    Returns:
        The ratio; NaN where it is undefined. The error of a single sequence is NaN: unknown.
    """
    a, b = numerators.double(), denominators.double()
    n, total = a.numel(), float(b.sum())
    if n == 0 or total == 0.0:
        return Measurement(math.nan, math.nan)
    ratio = float(a.sum()) / total
    if n == 1:
        return Measurement(ratio, math.nan)
    residuals = a - ratio * b
    variance = float((residuals * residuals).sum()) * n / (n - 1) / total**2
    return Measurement(ratio, math.sqrt(variance) if variance >= 0 else math.nan)


def mean(values: Tensor) -> Measurement:
    """The mean of one value per sequence, shape ``(n,)``, with its standard error."""
    return ratio_of_sums(values, torch.ones_like(values, dtype=torch.float64))


def exponential(log: Measurement) -> Measurement:
    """``exp`` of a measurement, delta method; overflows to infinity instead of raising."""
    value = float(torch.tensor(log.value, dtype=torch.float64).exp())
    return Measurement(value, value * log.standard_error)


def affine(measurement: Measurement, scale: float, offset: float) -> Measurement:
    """``scale * measurement + offset``."""
    return Measurement(scale * measurement.value + offset, abs(scale) * measurement.standard_error)
