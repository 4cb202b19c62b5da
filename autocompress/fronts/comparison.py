"""Whether a front beats what needs no search: each baseline against the best member that fits.

The significance of a difference is judged one-sidedly at `CONFIDENT` standard errors. The member
is the best of the front at no more bytes (at no more of each resource that the study optimized),
chosen on the very tokens that judge it, so a gain of
little more than that is optimistic.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from autocompress.core import DEFAULT_OBJECTIVES, STORAGE, Measurement, Objectives
from autocompress.core.objectives import takes_no_more
from autocompress.fronts.entries import Member

CONFIDENT = 1.645  # one-sided 5 % of the normal distribution


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
    """

    retained: Measurement
    damage: Measurement | None = None

    @property
    def verdict(self) -> Verdict:
        """Better or worse only if the error bars and the retained quality agree; else a tie.

        The paired damages judge significance where they are known, as they share the noise of the
        tokens; retained quality gives the sign, as it is what the front is made of.
        """
        judged = self.retained if self.damage is None else self.damage
        gain = judged.value if self.damage is None else -judged.value
        margin = CONFIDENT * judged.standard_error
        if gain > margin and self.retained.value > 0:
            return Verdict.BETTER
        if -gain > margin and self.retained.value < 0:
            return Verdict.WORSE
        return Verdict.TIE


Differences = Callable[[Member, Member], Difference]
"""From (member, baseline) to what separates them."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A baseline against the best member of the front that takes no more of what is optimized.

    Attributes:
        baseline: its name.
        verdict: ``none`` if no member fits or the baseline has no finite quality.
        member: id of the member; empty if there is none.
        is_itself: True if the baseline is that member: every other one that fits is significantly
            worse, or none fits. The search then found nothing better there.
        bytes_saved: baseline minus member; below 0 only if bytes are not optimized.
        difference: member minus baseline; None without a member.
        saved: the same of each other optimized resource.
    """

    baseline: str
    verdict: Verdict
    member: str = ""
    is_itself: bool = False
    bytes_saved: int = 0
    difference: Difference | None = None
    saved: Mapping[str, float] = field(default_factory=dict)

    def saving(self, resource: str) -> float:
        """Baseline minus member, of one optimized resource."""
        return self.bytes_saved if resource == STORAGE else self.saved[resource]

    @property
    def label(self) -> str:
        """The verdict; ``tie (itself)`` where only the baseline matches itself."""
        return f"{self.verdict.value} (itself)" if self.is_itself else self.verdict.value

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what does not apply is left out, what is not finite is null."""
        data: dict[str, Any] = {"baseline": self.baseline, "verdict": self.verdict.value}
        if self.difference is None:
            return data
        data |= {"member": self.member, "bytes_saved": self.bytes_saved}
        if self.saved:
            data["saved"] = dict(self.saved)
        if self.is_itself:
            data["is_itself"] = True
        data["retained_difference"] = _to_json(self.difference.retained)
        if self.difference.damage is not None:
            data["damage_difference_per_sequence"] = _to_json(self.difference.damage)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """The inverse of `to_json`."""
        difference = None
        if "retained_difference" in data:
            damage = data.get("damage_difference_per_sequence")
            difference = Difference(
                _from_json(data["retained_difference"]), _from_json(damage) if damage else None
            )
        return cls(
            baseline=str(data["baseline"]),
            verdict=Verdict(data["verdict"]),
            member=str(data.get("member", "")),
            is_itself=bool(data.get("is_itself", False)),
            bytes_saved=int(data.get("bytes_saved", 0)),
            difference=difference,
            saved={name: float(value) for name, value in data.get("saved", {}).items()},
        )


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
        return Difference(plain.retained, paired_difference(one, other))

    return between


def paired_difference(new: Sequence[float], old: Sequence[float]) -> Measurement:
    """Mean of new minus old, finite and in the same order, with the error of the differences."""
    gaps = [a - b for a, b in zip(new, old, strict=True)]
    if len(gaps) < 2:
        return Measurement(sum(gaps), math.nan)
    return Measurement(statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)))


def against_baselines(
    members: Sequence[Member],
    baselines: Iterable[Member],
    differences: Differences = unpaired,
    objectives: Objectives = DEFAULT_OBJECTIVES,
) -> tuple[Comparison, ...]:
    """Each baseline against the member of highest retained quality at no more cost.

    The baseline itself, where it is on the front, counts only if that member is significantly
    worse or missing. If the front is that of candidates which hold the baselines, no verdict is
    ``worse``: a baseline off the front is beaten in retained quality by a member that fits.

    Args:
        members: of the front.
        baselines: in any order, which the answer keeps.
        differences: between a member and a baseline.
        objectives: the costs that count, each of them.
    """
    return tuple(_against(members, baseline, differences, objectives) for baseline in baselines)


def comparison_summary(
    comparisons: Sequence[Comparison], objectives: Objectives = DEFAULT_OBJECTIVES
) -> str:
    """For people: at which baselines the front is no worse, where it failed, by what."""
    if not comparisons:
        return ""
    better = sum(c.verdict is Verdict.BETTER for c in comparisons)
    text = (
        f"At no more {objectives.words} the front is significantly better than {better} of "
        f"{len(comparisons)} baselines"
    )
    alone = [c.baseline for c in comparisons if c.is_itself]
    failed = [c.baseline for c in comparisons if c.verdict in (Verdict.WORSE, Verdict.NONE)]
    if alone:
        text += f"; the search found nothing else as good as {', '.join(alone)}"
    if failed:
        text += f"; it holds nothing as good as {', '.join(failed)}"
    if any(c.difference is not None and c.difference.damage is not None for c in comparisons):
        text += (
            ". Verdicts are of the damage of each sequence, in pairs, at 5 % each; the "
            "best that fits is chosen on the same tokens, which flatters it; the errors of Δ "
            "retained take the two models as independent"
        )
    return text + "."


def _against(
    members: Sequence[Member],
    baseline: Member,
    differences: Differences,
    objectives: Objectives,
) -> Comparison:
    if not math.isfinite(baseline.quality.retained):
        return Comparison(baseline.name, Verdict.NONE)
    costs = objectives.costs
    limits = costs(baseline)
    fitting = [
        m for m in members if math.isfinite(m.quality.retained) and takes_no_more(costs(m), limits)
    ]
    itself = next((m for m in fitting if m.id == baseline.id), None)
    others = [m for m in fitting if m.id != baseline.id]
    best = min(others, key=lambda m: (-m.quality.retained, costs(m), m.id), default=None)
    verdict = differences(best, baseline).verdict if best else Verdict.NONE
    if itself is not None and verdict in (Verdict.WORSE, Verdict.NONE):
        best, verdict = itself, Verdict.TIE
    if best is None:
        return Comparison(baseline.name, Verdict.NONE)
    return Comparison(
        baseline=baseline.name,
        verdict=verdict,
        member=best.id,
        is_itself=best is itself,
        bytes_saved=baseline.storage_bytes - best.storage_bytes,
        difference=differences(best, baseline),
        saved={
            name: most - own
            for name, own, most in zip(objectives.resources, costs(best), limits, strict=True)
            if name != STORAGE
        },
    )


def _to_json(measurement: Measurement) -> dict[str, float | None]:
    values = measurement.to_json()
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _from_json(data: Mapping[str, float | None]) -> Measurement:
    value, error = (math.nan if x is None else x for x in (data["value"], data["standard_error"]))
    return Measurement(value, error)
