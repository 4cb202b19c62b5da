"""A model of the measured damage that starts from the predicted one and trusts measurements.

    log D(a) = log S0 + b + g log(S(a) / S0),    S(a) = sum_i s_{i, a_i} exp(u_{i, a_i})

``s`` is the predicted damage of each option; ``u`` its correction, a sum of Gaussian effects (see
`OptionFeatures`); ``b`` and ``g`` say how damages of single layers compound: g > 1 where errors
amplify each other along the depth, g < 1 where damage saturates. All unknowns are found together as
the mode of their posterior by Gauss-Newton steps; the linear model at the mode gives variances and
samples (Laplace approximation; MacKay, Bayesian Interpolation, Neural Computation 4, 1992). It is
solved over trials instead of effects, so thousands of effects cost no more than a few.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import linalg, sparse

from autocompress.search.guided.features import SD_CHOICE, SD_OPTION, Levels, OptionFeatures
from autocompress.search.option_table import Floats

_SD_OFFSET = 1.0
_SD_LOG_POWER = 0.25
_N_STEPS = 8
_MOST_HALVINGS = 5
_CONVERGED = 1e-3
_FEWEST_FOR_NOISE = 4
_SMALLEST_SHARE = 1e-12
_NOISES = (0.02, 0.04, 0.08, 0.16, 0.32)
_SCALES = (0.02, 0.06, 0.17, 0.35, 0.7, 1.4, 2.8)


@dataclass(frozen=True, eq=False)
class Observations:
    """Measured trials.

    Attributes:
        levels: (n, n_choices).
        log_damage: (n,).
        extra_sd: what is uncertain about each beyond the model's own error, e.g. because the trial
            saw a part of the tokens, (n,).
    """

    levels: Levels
    log_damage: Floats
    extra_sd: Floats

    def __len__(self) -> int:
        return len(self.log_damage)


@dataclass(frozen=True, eq=False)
class Unknowns:
    """Everything that is not known, in units of its prior standard deviation.

    Attributes:
        law: offset and log power of the law of compounding, (2,).
        shared: effects that several choices share, (n_shared,).
        choices: of single choices, (n_choices,).
        options: of single options, (n_rows,).
    """

    law: Floats
    shared: Floats
    choices: Floats
    options: Floats

    @classmethod
    def zeros(cls, features: OptionFeatures) -> Unknowns:
        """The prior's mean."""
        n_choices, n_shared = len(features.n_options), features.shared.shape[1]
        return cls(*(np.zeros(n) for n in (2, n_shared, n_choices, features.n_rows)))

    @classmethod
    def draw(cls, features: OptionFeatures, generator: np.random.Generator) -> Unknowns:
        """A draw of the prior."""
        parts = cls.zeros(features).parts
        return cls(*(generator.standard_normal(len(part)) for part in parts))

    @property
    def parts(self) -> tuple[Floats, Floats, Floats, Floats]:
        """All of them."""
        return self.law, self.shared, self.choices, self.options

    def towards(self, other: Unknowns, share: float) -> Unknowns:
        """A part of the way to another point."""
        return Unknowns(
            *(a + share * (b - a) for a, b in zip(self.parts, other.parts, strict=True))
        )

    def plus(self, other: Unknowns) -> Unknowns:
        """The sum."""
        return Unknowns(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))


@dataclass(frozen=True, eq=False)
class Jacobian:
    """Derivative of the log damages of m allocations by the unknowns.

    Attributes:
        law: (m, 2).
        shared: (m, n_shared).
        shares: by the correction of each choice's option, (m, n_choices).
        levels: which option that is, (m, n_choices).
    """

    law: Floats
    shared: Floats
    shares: Floats
    levels: Levels

    def kernel(self, other: Jacobian, scale: float) -> Floats:
        """Prior covariance of log damages, (m, other m); `scale` is that of the effects."""
        effects = self.shared @ other.shared.T + SD_CHOICE**2 * (self.shares @ other.shares.T)
        for mine, others in zip(self._by_level, other._by_level, strict=False):
            effects += SD_OPTION**2 * (mine @ others.T)
        kernel: Floats = self.law @ other.law.T + scale * effects
        return kernel

    @cached_property
    def _by_level(self) -> list[Floats]:
        """The shares of choices that have each level, zero elsewhere."""
        n_levels = int(self.levels.max()) + 1
        return [np.where(self.levels == level, self.shares, 0.0) for level in range(n_levels)]

    def variances(self, scale: float) -> Floats:
        """Diagonal of the kernel with itself, (m,)."""
        own = (self.shared**2).sum(1) + (SD_CHOICE**2 + SD_OPTION**2) * (self.shares**2).sum(1)
        variances: Floats = (self.law**2).sum(1) + scale * own
        return variances

    def times(self, unknowns: Unknowns, features: OptionFeatures, scale: float) -> Floats:
        """The linear change of the log damages, (m,)."""
        options = SD_OPTION * unknowns.options[features.rows(self.levels)]
        single = (self.shares * (SD_CHOICE * unknowns.choices + options)).sum(1)
        effects = self.shared @ unknowns.shared + single
        change: Floats = self.law @ unknowns.law + np.sqrt(scale) * effects
        return change

    def adjoint(self, weights: Floats, features: OptionFeatures, scale: float) -> Unknowns:
        """The unknowns that weights (m,) of the log damages pull at."""
        root = np.sqrt(scale)
        weighted = self.shares * weights[:, None]
        rows = features.rows(self.levels)
        options = np.bincount(rows.ravel(), weighted.ravel(), minlength=features.n_rows)
        return Unknowns(
            law=self.law.T @ weights,
            shared=root * (self.shared.T @ weights),
            choices=root * SD_CHOICE * weighted.sum(0),
            options=root * SD_OPTION * options,
        )


class Surrogate:
    """Predicts log damage with its uncertainty. Fitted on construction.

    Args:
        features: of the options.
        data: what was measured; may be empty.
    """

    def __init__(self, features: OptionFeatures, data: Observations) -> None:
        self._features = features
        self._data = data
        self._floor = _SMALLEST_SHARE * max(float(features.damage.max(initial=0.0)), 1e-300)
        self._center = self._mean_log_sum()
        self.noise, self._scale = _NOISES[2], 1.0
        self._mode = Unknowns.zeros(features)
        self._fit()
        if len(data) >= _FEWEST_FOR_NOISE:
            self._choose_noise()
            self._mode = Unknowns.zeros(features)
            self._fit()

    @property
    def power(self) -> float:
        """How the measured damage grows with the sum of the single ones; 1: it is their sum."""
        return _power(self._mode)

    def predict(self, levels: Levels) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the log damage of levels (m, n_choices), each (m,)."""
        mean, jacobian = self._linearised(self._mode, levels)
        variances = jacobian.variances(self._scale)
        if len(self._data):
            cross = linalg.solve_triangular(
                self._lower, self._jacobian.kernel(jacobian, self._scale), lower=True
            )
            variances = variances - (cross**2).sum(0)
        return mean, np.sqrt(np.maximum(variances, 0.0) + self.noise**2)

    def damages(self, generator: np.random.Generator | None = None) -> Floats:
        """Corrected damage of every option alone, (n_choices, most options).

        Args:
            generator: None for the most likely corrections, else one draw of the posterior.
        """
        unknowns = self._mode if generator is None else self._draw(generator)
        return self._features.by_choice(self._corrected(unknowns))

    def _draw(self, generator: np.random.Generator) -> Unknowns:
        """A posterior sample by correcting a prior sample (Matheron's rule)."""
        prior = Unknowns.draw(self._features, generator)
        if not len(self._data):
            return prior
        seen = self._jacobian.times(prior, self._features, self._scale)
        seen = seen + self._sd * generator.standard_normal(len(self._data))
        pull = linalg.cho_solve((self._lower, True), -seen)
        correction = self._jacobian.adjoint(pull, self._features, self._scale)
        return self._mode.plus(prior).plus(correction)

    @property
    def _sd(self) -> Floats:
        return np.sqrt(self.noise**2 + self._data.extra_sd**2)

    def _mean_log_sum(self) -> float:
        if not len(self._data):
            return 0.0
        rows = self._features.rows(self._data.levels)
        return float(np.log(self._features.damage[rows].sum(1) + self._floor).mean())

    def _corrected(self, unknowns: Unknowns) -> Floats:
        """Damage of each option alone, (n_rows,)."""
        features = self._features
        single = SD_CHOICE * unknowns.choices[features.choice] + SD_OPTION * unknowns.options
        correction = np.sqrt(self._scale) * (features.shared @ unknowns.shared + single)
        corrected: Floats = features.damage * np.exp(correction)
        return corrected

    def _fit(self) -> None:
        """Damped Gauss-Newton steps to the posterior mode.

        The noise shrinks to its value on the way: far from the mode a small one would follow the
        linear model to where it does not hold.
        """
        if not len(self._data):
            return
        final = self.noise
        for noise in [n for n in reversed(_NOISES) if n > final] + [final] * _N_STEPS:
            self.noise = noise
            mean, self._jacobian = self._linearised(self._mode, self._data.levels)
            known = self._jacobian.times(self._mode, self._features, self._scale)
            self._lower = self._cholesky()
            pull = linalg.cho_solve((self._lower, True), self._data.log_damage - mean + known)
            if not self._step(self._jacobian.adjoint(pull, self._features, self._scale)):
                break
        self.noise = final
        self._jacobian = self._linearised(self._mode, self._data.levels)[1]
        self._lower = self._cholesky()

    def _step(self, target: Unknowns) -> bool:
        """Go towards the target as far as the posterior grows; False if it hardly does."""
        before = self._misfit(self._mode)
        share = 1.0
        for _ in range(_MOST_HALVINGS):
            there = self._mode.towards(target, share)
            after = self._misfit(there)
            if after < before:
                self._mode = there
                return before - after > _CONVERGED * before or self.noise > _NOISES[0]
            share /= 2
        return False

    def _misfit(self, unknowns: Unknowns) -> float:
        """Minus the log posterior, up to a constant."""
        mean = self._expected(unknowns, self._parts(unknowns, self._data.levels)[1])
        residual = (self._data.log_damage - mean) / self._sd
        return 0.5 * float(residual @ residual) + 0.5 * sum(float(p @ p) for p in unknowns.parts)

    def _cholesky(self) -> Floats:
        kernel = self._jacobian.kernel(self._jacobian, self._scale)
        kernel[np.diag_indices_from(kernel)] += self._sd**2
        lower: Floats = linalg.cholesky(kernel, lower=True)
        return lower

    def _choose_noise(self) -> None:
        """The noise and the scale of the effects under which the measurements are most likely."""
        mean, jacobian = self._linearised(self._mode, self._data.levels)
        known = jacobian.times(self._mode, self._features, self._scale)
        target = self._data.log_damage - mean + known
        of_law = jacobian.law @ jacobian.law.T
        effects = jacobian.kernel(jacobian, 1.0) - of_law
        best = -np.inf
        for noise in _NOISES:
            variance = np.diag(noise**2 + self._data.extra_sd**2)
            for scale in _SCALES:
                evidence = _evidence(of_law + scale * effects + variance, target)
                if evidence > best:
                    best, self.noise, self._scale = evidence, noise, scale

    def _parts(self, unknowns: Unknowns, levels: Levels) -> tuple[Floats, Floats]:
        """Damages of the choices' options alone (m, n_choices), and their sums (m,)."""
        parts: Floats = self._corrected(unknowns)[self._features.rows(levels)]
        return parts, parts.sum(1) + self._floor

    def _expected(self, unknowns: Unknowns, totals: Floats) -> Floats:
        """Mean log damage of such sums, (m,)."""
        relative = np.log(totals) - self._center
        return self._center + (_SD_OFFSET * float(unknowns.law[0]) + _power(unknowns) * relative)

    def _linearised(self, unknowns: Unknowns, levels: Levels) -> tuple[Floats, Jacobian]:
        """Mean log damage (m,) and its derivative."""
        features, power = self._features, _power(unknowns)
        parts, totals = self._parts(unknowns, levels)
        shares = power * parts / totals[:, None]
        relative = np.log(totals) - self._center
        law = np.column_stack((np.full(len(parts), _SD_OFFSET), _SD_LOG_POWER * power * relative))
        spread = sparse.csr_array(
            (
                shares.ravel(),
                features.rows(levels).ravel(),
                np.arange(len(parts) + 1) * parts.shape[1],
            ),
            shape=(len(parts), features.n_rows),
        )
        shared: Floats = spread @ features.shared
        return self._expected(unknowns, totals), Jacobian(law, shared, shares, levels)


def _power(unknowns: Unknowns) -> float:
    return float(np.exp(_SD_LOG_POWER * unknowns.law[1]))


def _evidence(kernel: Floats, target: Floats) -> float:
    """Log likelihood of `target` under a Gaussian of that covariance, up to a constant."""
    lower = linalg.cholesky(kernel, lower=True)
    white = linalg.solve_triangular(lower, target, lower=True)
    return -0.5 * float(white @ white) - float(np.log(np.diag(lower)).sum())
