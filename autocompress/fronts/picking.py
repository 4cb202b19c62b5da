"""Choosing a member of a front, and reading what people type to say which."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from autocompress.core.errors import NoAnswerError, UnknownNameError, UsageError, nearest
from autocompress.core.metrics import require_share
from autocompress.core.objectives import LATENCY, Objectives
from autocompress.fronts.entries import Member
from autocompress.fronts.geometry import knee_index

if TYPE_CHECKING:
    from autocompress.fronts.document import FrontDocument

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([+-]?[\d.]+(?:e[+-]?\d{1,3})?)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Constraint:
    """A limit on one number of a member: at least `limit` if it is a floor, else at most."""

    option: str
    limit: float
    value: Callable[[Member], float]
    is_floor: bool
    show: Callable[[float], str]
    reason: str = ""

    def allows(self, member: Member) -> bool:
        value = self.value(member)
        return value >= self.limit if self.is_floor else value <= self.limit

    def violation(self, member: Member) -> float:
        """How far off the limit, relative to it; 0 if allowed, infinite if not known."""
        value = self.value(member)
        if math.isnan(value):
            return math.inf
        excess = self.limit - value if self.is_floor else value - self.limit
        return max(excess, 0.0) / abs(self.limit or 1.0)

    def describe(self, members: Sequence[Member]) -> str:
        """What the limit rules out, e.g. ``--min-quality 0.97 rules out 2 of 5 (best: 0.96)``."""
        values = [v for v in map(self.value, members) if not math.isnan(v)]
        ruled_out = sum(not self.allows(member) for member in members)
        best = (max if self.is_floor else min)(values, default=math.nan)
        shown = "none has it" if math.isnan(best) else f"best is {self.show(best)}"
        return (
            f"{self.option} {self.show(self.limit)}{self.reason} rules out {ruled_out} of "
            f"{len(members)} ({shown})"
        )


def pick(
    document: FrontDocument,
    *,
    by: str = "cost-efficiency",
    min_quality: float | None = None,
    max_bytes: int | None = None,
    max_latency_ms: float | None = None,
) -> Member:
    """The best member under constraints.

    Args:
        document: the front.
        by: ``cost-efficiency``; ``quality`` (highest retained); ``size`` (fewest bytes);
            ``knee`` (of the members that fit, over what the study optimized). Ties go to the higher
            quality, then to the fewer bytes, then to the smaller id.
        min_quality: least retained quality. A pick by cost efficiency without it uses the floor
            that the study's cost efficiency states, as a broken model can be very efficient.
        max_bytes: most stored bytes.
        max_latency_ms: most milliseconds per token; a member without latency does not fit.

    Raises:
        UsageError: `by` is unknown, or `min_quality` is in percent.
        NoAnswerError: no member fits; the message says what each constraint rules out and which
            member comes nearest.
    """
    if by not in PICK_RULES:
        raise UsageError(f"Unknown rule {by!r} to pick by. {nearest(by, PICK_RULES)}")
    require_share("--min-quality", min_quality)
    floor, reason = min_quality, ""
    if min_quality is None and by == "cost-efficiency":
        floor, reason = document.study.quality_floor, " (the floor of cost efficiency)"
    constraints = _constraints(floor, reason, max_bytes, max_latency_ms)
    fitting = [m for m in document.members if all(c.allows(m) for c in constraints)]
    if not fitting:
        raise NoAnswerError(_explain(document.members, constraints))
    return PICK_RULES[by](fitting, document.objectives)


def find_member(document: FrontDocument, name: str) -> Member:
    """The member or baseline that `name` means.

    Args:
        document: the front.
        name: an id, the start of an id that no other member or baseline shares, or the name of
            a baseline. A finalized member also answers to the id that it had before, unless a
            baseline still has it.

    Raises:
        UnknownNameError: nothing, or more than one thing, is called that.
    """
    rebuilt = {m.finalized.searched_as: m for m in document.members if m.finalized}
    entries = rebuilt | {m.id: m for m in (*document.baselines, *document.members)}
    by_name = {m.name: m for m in document.baselines}
    exact = entries.get(name) or by_name.get(name)
    if exact is not None:
        return exact
    starting = sorted(i for i in entries if name and i.startswith(name))
    if len(starting) == 1:
        return entries[starting[0]]
    if starting:
        raise UnknownNameError(
            f"{name!r} is the start of {len(starting)} ids: {', '.join(starting[:5])}. Next "
            "step: give more digits."
        )
    raise UnknownNameError(
        f"No member or baseline is called {name!r}. {nearest(name, [*entries, *by_name])}"
    )


def parse_bytes(text: str | float) -> int:
    """Read a size such as ``60MB``, ``1.5GiB`` or ``60000000``; part of a byte is cut off.

    kB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB are powers of 1024. Case and
    spaces do not matter. A bare ``60M`` is refused, as it may mean either.

    Raises:
        UsageError: the text is no size of at least one byte.
    """
    match = _SIZE.fullmatch(str(text))
    unit = match[2].lower() if match else ""
    try:
        # Decimal: 0.1 GB is exactly 100,000,000 bytes.
        size = int(Decimal(match[1]) * _UNITS[unit]) if match else 0
    except (ArithmeticError, KeyError):
        size = 0
    if size < 1 or isinstance(text, bool):
        bare = (
            f" {text!s} may mean {text!s}B or {text!s}iB." if unit in ("k", "m", "g", "t") else ""
        )
        raise UsageError(
            "A size is a number above 0 with a unit such as kB, MB, GB (powers of 1000) or KiB, "
            f"MiB, GiB (powers of 1024), but got {text!r}.{bare} Example: 60MB."
        )
    return size


def _by_cost_efficiency(members: Sequence[Member], _: Objectives) -> Member:
    scored = [m for m in members if not math.isnan(m.cost_efficiency)]
    if not scored:
        raise NoAnswerError(
            "No member that fits has a cost efficiency. Next step: pick by quality, size or knee."
        )
    return min(scored, key=lambda m: (-m.cost_efficiency, *_preference(m)))


def _by_quality(members: Sequence[Member], _: Objectives) -> Member:
    return min(members, key=_preference)


def _by_size(members: Sequence[Member], _: Objectives) -> Member:
    return min(members, key=lambda m: (m.storage_bytes, *_preference(m)))


def _by_knee(members: Sequence[Member], objectives: Objectives) -> Member:
    ordered = sorted(members, key=_preference)
    return ordered[knee_of(ordered, objectives)]


def knee_of(members: Sequence[Member], objectives: Objectives) -> int:
    """Index of the knee, over the optimized resources; see `knee_index`."""
    cost, *others = zip(*map(objectives.costs, members), strict=True)
    return knee_index(cost, [m.quality.retained for m in members], *others)


PICK_RULES: dict[str, Callable[[Sequence[Member], Objectives], Member]] = {
    "cost-efficiency": _by_cost_efficiency,
    "quality": _by_quality,
    "size": _by_size,
    "knee": _by_knee,
}


def _preference(member: Member) -> tuple[float, int, str]:
    return (-member.quality.retained, member.storage_bytes, member.id)


def _constraints(
    min_quality: float | None, reason: str, max_bytes: int | None, max_latency_ms: float | None
) -> list[_Constraint]:
    found: list[_Constraint] = []
    if min_quality is not None:
        found.append(
            _Constraint(
                "--min-quality", min_quality, lambda m: m.quality.retained, True, _plain, reason
            )
        )
    if max_bytes is not None:
        found.append(
            _Constraint("--max-bytes", max_bytes, lambda m: m.storage_bytes, False, _megabytes)
        )
    if max_latency_ms is not None:
        found.append(
            _Constraint(
                "--max-latency-ms", max_latency_ms, lambda m: m.latency_ms_per_token, False, _plain
            )
        )
    return found


def _explain(members: Sequence[Member], constraints: Sequence[_Constraint]) -> str:
    if not members:
        return (
            "The front has no members. Next step: see the failed trials in trials.jsonl, or "
            "search with a larger budget."
        )
    why = "; ".join(constraint.describe(members) for constraint in constraints)
    near = min(members, key=lambda m: (sum(c.violation(m) for c in constraints), *_preference(m)))
    held = f"retains {near.quality.retained:.4g} at {_megabytes(near.storage_bytes)}"
    if not math.isnan(near.latency_ms_per_token):
        origin = near.resources[LATENCY].origin
        held += f" and {near.latency_ms_per_token:.4g} ms per token ({origin})"
    relax = " or ".join(c.option for c in constraints if not c.allows(near))
    return (
        f"No member of the front fits: {why}. The nearest, {near.id[:8]}, {held}. Next step: "
        f"relax {relax}, or search with a larger budget."
    )


def _plain(value: float) -> str:
    return f"{value:.6g}"


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.4g}MB"
