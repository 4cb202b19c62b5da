"""Whether a front beats what needs no search: each baseline against a searched model that fits.

That model is the best of all that were measured and take no more, by the search tokens, so that
the report tokens judge one which they did not choose: the best of several equal models on the very
tokens that judge it looks significant several times as often as said. All baselines together are
judged at 5 % (Holm), one-sided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from autocompress.core import DEFAULT_OBJECTIVES, STORAGE, Objectives
from autocompress.core.objectives import takes_no_more
from autocompress.fronts.difference import Difference, Differences, Verdict, holm, unpaired
from autocompress.fronts.entries import Member, measurement_from_json, measurement_to_json

_SEARCH, _REPORT = "search", "report"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A baseline against a searched model that takes no more of what is optimized.

    Attributes:
        baseline: its name.
        verdict: ``none`` if no member fits or the baseline has no finite quality.
        member: id of the member of the front that was judged, or that takes no more and retains no
            less than the model that was; empty if there is none.
        is_itself: True if the baseline is that member: every other one that fits is significantly
            worse, or none fits. The search then found nothing better there.
        bytes_saved: baseline minus member; below 0 only if bytes are not optimized.
        difference: the judged model minus the baseline; None without one.
        saved: as `bytes_saved`, of each other optimized resource.
        judged: id of the judged model where it is not the member.
        chosen_on: tokens that chose the judged model: ``search``, or ``report`` where damages on
            search tokens are not known, which flatters it.
    """

    baseline: str
    verdict: Verdict
    member: str = ""
    is_itself: bool = False
    bytes_saved: int = 0
    difference: Difference | None = None
    saved: Mapping[str, float] = field(default_factory=dict)
    judged: str = ""
    chosen_on: str = _REPORT

    def saving(self, resource: str) -> float:
        """Baseline minus member, of one optimized resource."""
        return self.bytes_saved if resource == STORAGE else self.saved[resource]

    @property
    def is_duel(self) -> bool:
        """True if another model than the baseline was judged."""
        return self.difference is not None and not self.is_itself

    @property
    def is_flattered(self) -> bool:
        """True if the tokens that judged the model also chose it."""
        return self.is_duel and self.chosen_on == _REPORT

    @property
    def label(self) -> str:
        """The verdict; ``tie (itself)`` where only the baseline matches itself."""
        return f"{self.verdict.value} (itself)" if self.is_itself else self.verdict.value

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what does not apply is left out, what is not finite is null."""
        data: dict[str, Any] = {"baseline": self.baseline, "verdict": self.verdict.value}
        difference = self.difference
        if difference is None:
            return data
        data |= {"member": self.member, "chosen_on": self.chosen_on}
        data |= {"judged": self.judged} if self.judged else {}
        data |= {"bytes_saved": self.bytes_saved}
        data |= {"saved": dict(self.saved)} if self.saved else {}
        data |= {"is_itself": True} if self.is_itself else {}
        data["retained_difference"] = measurement_to_json(difference.retained)
        if difference.damage is not None:
            data["damage_difference_per_sequence"] = measurement_to_json(difference.damage)
            data["sequences"] = difference.n_sequences
        data["p_value"] = difference.p_value
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """The inverse of `to_json`."""
        difference = None
        if "retained_difference" in data:
            damage = data.get("damage_difference_per_sequence")
            difference = Difference(
                measurement_from_json(data["retained_difference"]),
                measurement_from_json(damage) if damage else None,
                int(data.get("sequences", 0)),
            )
        return cls(
            baseline=str(data["baseline"]),
            verdict=Verdict(data["verdict"]),
            member=str(data.get("member", "")),
            is_itself=bool(data.get("is_itself", False)),
            bytes_saved=int(data.get("bytes_saved", 0)),
            difference=difference,
            saved={name: float(value) for name, value in data.get("saved", {}).items()},
            judged=str(data.get("judged", "")),
            chosen_on=str(data.get("chosen_on", _REPORT)),
        )


def against_baselines(
    members: Sequence[Member],
    baselines: Iterable[Member],
    differences: Differences = unpaired,
    objectives: Objectives = DEFAULT_OBJECTIVES,
    *,
    candidates: Sequence[Member] = (),
    searched: Mapping[str, float] = MappingProxyType({}),
) -> tuple[Comparison, ...]:
    """Each baseline against the model of least damage on search tokens at no more cost.

    A model that the search tokens chose and the report tokens find worse gives way to the best of
    the front that fits, which is then no more than a tie. The baseline itself, where it is on the
    front, counts only if that is significantly worse too or missing. If the front is that of
    candidates which hold the baselines, no verdict is ``worse``: a baseline off the front is beaten
    in retained quality by a member that fits.

    Args:
        members: of the front.
        baselines: in any order, which the answer keeps.
        differences: between a model and a baseline.
        objectives: the costs that count, each of them.
        candidates: all that was measured; empty for the members alone.
        searched: damage on search tokens, by id. Models without do not stand against a baseline,
            unless no model that fits has one: then the report tokens choose.
    """
    field_of = _Field(members, candidates or members, searched, objectives)
    duels = [_duel(field_of, baseline, differences) for baseline in baselines]
    chances = {d.baseline.name: d.judged.p_value for d in duels if d.judged}
    significant = holm(chances)
    return tuple(_compared(field_of, d, d.baseline.name in significant) for d in duels)


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
    duels = [c for c in comparisons if c.is_duel]
    if any(c.difference and c.difference.damage is not None for c in duels):
        text += (
            ". Verdicts are of the damage of each sequence, in pairs, at 5 % for all baselines "
            "together; the errors of Δ retained take the two models as independent"
        )
    flattered = [c.baseline for c in duels if c.is_flattered]
    if flattered:
        best = "The" if len(flattered) == len(duels) else f"Against {', '.join(flattered)} the"
        text += f". {best} best that fits is chosen on the same tokens, which flatters it"
    return text + "."


@dataclass(frozen=True, slots=True)
class _Field:
    """Who may stand against a baseline."""

    members: Sequence[Member]
    candidates: Sequence[Member]
    searched: Mapping[str, float]
    objectives: Objectives

    def fitting(self, models: Sequence[Member], baseline: Member) -> list[Member]:
        """Models of known quality that take no more than a baseline, which is left out."""
        costs = self.objectives.costs
        limits = costs(baseline)
        return [
            m
            for m in models
            if math.isfinite(m.quality.retained)
            and takes_no_more(costs(m), limits)
            and m.id != baseline.id
        ]

    def best(self, models: Sequence[Member]) -> Member | None:
        """By retained quality."""
        costs = self.objectives.costs
        return min(models, key=lambda m: (-m.quality.retained, costs(m), m.id), default=None)

    def chosen(self, baseline: Member) -> tuple[Member | None, str]:
        """The model that is judged, and the tokens that chose it."""
        damages = self.searched
        fitting = self.fitting(self.candidates, baseline)
        known = [m for m in fitting if math.isfinite(damages.get(m.id, math.nan))]
        if known:
            return min(known, key=lambda m: (damages[m.id], m.id)), _SEARCH
        return self.best(self.fitting(self.members, baseline)), _REPORT

    def standing_for(self, model: Member, baseline: Member) -> Member:
        """The model if it is on the front, else a member that beats it, best not the baseline."""
        if any(m.id == model.id for m in self.members):
            return model
        costs = self.objectives.costs
        above = [
            m
            for m in self.members
            if takes_no_more(costs(m), costs(model))
            and m.quality.retained >= model.quality.retained
        ]
        return self.best([m for m in above if m.id != baseline.id]) or self.best(above) or model


@dataclass(frozen=True, slots=True)
class _Duel:
    """A baseline and what stands against it.

    Attributes:
        baseline: of finite quality, if there is anything to compare.
        model: that is judged; None if none fits.
        chosen_on: tokens that chose it.
        judged: it minus the baseline.
        fallback: the best of the front that fits, and it minus the baseline, where the judged model
            is worse, or off the front and beaten by the baseline alone.
        itself: the baseline as a member of the front.
    """

    baseline: Member
    model: Member | None = None
    chosen_on: str = _REPORT
    judged: Difference | None = None
    fallback: tuple[Member, Difference] | None = None
    itself: Member | None = None


def _duel(field_of: _Field, baseline: Member, differences: Differences) -> _Duel:
    if not math.isfinite(baseline.quality.retained):
        return _Duel(baseline)
    itself = next((m for m in field_of.members if m.id == baseline.id), None)
    model, chosen_on = field_of.chosen(baseline)
    if model is None:
        return _Duel(baseline, itself=itself)
    judged = differences(model, baseline)
    alone = field_of.standing_for(model, baseline).id == baseline.id
    best = field_of.best(field_of.fitting(field_of.members, baseline))
    if best is None and alone:
        return _Duel(baseline, itself=itself)
    gives_way = alone or judged.verdict is Verdict.WORSE
    fallback = (best, differences(best, baseline)) if best and gives_way else None
    return _Duel(baseline, model, chosen_on, judged, fallback, itself)


def _compared(field_of: _Field, duel: _Duel, is_significant: bool) -> Comparison:
    """The verdict of one baseline, its significance beside the others known."""
    model, judged = duel.model, duel.judged
    if duel.fallback is not None:
        model, judged = duel.fallback
    is_worse = judged is not None and judged.verdict is Verdict.WORSE
    verdict = Verdict.BETTER if is_significant else Verdict.WORSE if is_worse else Verdict.TIE
    if duel.itself is not None and (model is None or verdict is Verdict.WORSE):
        model, judged, verdict = duel.itself, unpaired(duel.itself, duel.itself), Verdict.TIE
    if model is None or judged is None:
        return Comparison(duel.baseline.name, Verdict.NONE)
    member = field_of.standing_for(model, duel.baseline)
    costs, objectives = field_of.objectives.costs, field_of.objectives
    amounts = zip(objectives.resources, costs(member), costs(duel.baseline), strict=True)
    return Comparison(
        baseline=duel.baseline.name,
        verdict=verdict,
        member=member.id,
        is_itself=member.id == duel.baseline.id,
        bytes_saved=duel.baseline.storage_bytes - member.storage_bytes,
        difference=judged,
        saved={name: most - own for name, own, most in amounts if name != STORAGE},
        judged="" if model.id == member.id else model.id,
        chosen_on=_REPORT if duel.fallback is not None else duel.chosen_on,
    )
