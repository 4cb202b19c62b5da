"""What separates two measured models, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from autocompress.core import Measurement
from autocompress.fronts.entries import Member

LEVEL = 0.05


class Verdict(StrEnum):
    """How the best member at no more cost compares with a baseline."""

    BETTER = "better"
    TIE = "tie"
    WORSE = "worse"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Difference:
    """A member minus a baseline, on the same tokens.

    Attributes:
        retained: difference of retained quality, positive where the member is better; its error
            takes the two as independent, which overstates it.
        damage: difference of damage per sequence, negative where the member is better, with the
            error of the paired differences; None if the damages of sequences are not known.
        n_sequences: that the damages are of; 0 if they are not known.
    """

    retained: Measurement
    damage: Measurement | None = None
    n_sequences: int = 0

    @property
    def p_value(self) -> float:
        """Chance of a gain as large between equal models, one-sided.

        By Student's t of the paired damages where they are known, as they share the noise of the
        tokens, else by the normal distribution. 1 where the retained quality, which the front is
        made of, does not grow, and where no error is known.
        """
        return self._chance(1.0)

    @property
    def verdict(self) -> Verdict:
        """Better or worse at `LEVEL`, one-sided and for this difference alone; else a tie."""
        if self.p_value <= LEVEL:
            return Verdict.BETTER
        return Verdict.WORSE if self._chance(-1.0) <= LEVEL else Verdict.TIE

    def _chance(self, sign: float) -> float:
        if not sign * self.retained.value > 0:
            return 1.0
        judged = self.retained if self.damage is None else self.damage
        gain = sign * (judged.value if self.damage is None else -judged.value)
        if math.isnan(judged.standard_error) or not gain > 0:
            return 1.0
        if judged.standard_error == 0:
            return 0.0
        from scipy.special import ndtr, stdtr  # slow to import; reading a front needs none of it

        score = gain / judged.standard_error
        known = self.damage is not None and self.n_sequences > 1
        return float(stdtr(self.n_sequences - 1, -score) if known else ndtr(-score))


Differences = Callable[[Member, Member], Difference]
"""From (member, baseline) to what separates them."""


def holm(p_values: Mapping[str, float], level: float = LEVEL) -> frozenset[str]:
    """Names that are significant together: at most a share `level` of such sets holds a false one.

    Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.
    """
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        if p_values[name] > level / (len(ordered) - rank):
            return frozenset(ordered[:rank])
    return frozenset(ordered)


def unpaired(member: Member, baseline: Member) -> Difference:
    """What separates two published entries, from their own error bars."""
    if member.id == baseline.id:
        return Difference(Measurement(0.0, 0.0))
    one, other = member.quality, baseline.quality
    error = math.hypot(one.standard_error, other.standard_error)
    return Difference(Measurement(one.retained - other.retained, error))


def paired(damages: Mapping[str, Sequence[float]]) -> Differences:
    """Differences that know the damage of every sequence.

    Args:
        damages: by id of a member or baseline, the damage of each sequence (summed over its
            tokens), in the same order for all. Of two that are not equally long, or shorter than
            two sequences, the differences stay unpaired.
    """

    def between(member: Member, baseline: Member) -> Difference:
        plain = unpaired(member, baseline)
        one, other = damages.get(member.id, ()), damages.get(baseline.id, ())
        if len(one) != len(other) or len(one) < 2 or member.id == baseline.id:
            return plain
        if not all(map(math.isfinite, (*one, *other))):
            return plain
        return Difference(plain.retained, paired_difference(one, other), len(one))

    return between


def paired_difference(new: Sequence[float], old: Sequence[float]) -> Measurement:
    """Mean of new minus old, finite and in the same order, with the error of the differences."""
    gaps = [a - b for a, b in zip(new, old, strict=True)]
    if len(gaps) < 2:
        return Measurement(sum(gaps), math.nan)
    return Measurement(statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)))
