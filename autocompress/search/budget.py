"""Budgets: how much a study may spend. The first limit that is reached ends it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from autocompress.core.errors import BudgetError, nearest

_EXAMPLES = "'200 trials', '30m', '1h30m', '90s', '2e6 tokens', '4 gpu-hours'"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_AMOUNT = re.compile(rf"\s*({_NUMBER})\s*([A-Za-z-]*)\s*$")
_DURATION = re.compile(rf"\s*(?:{_NUMBER}\s*(?:d|h|m|min|s)\s*)+$")
_DURATION_PART = re.compile(rf"({_NUMBER})\s*(d|h|min|m|s)")
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}
_UNITS = {
    "": "trials",
    "trial": "trials",
    "trials": "trials",
    "token": "tokens",
    "tokens": "tokens",
    "gpu-hour": "gpu_seconds",
    "gpu-hours": "gpu_seconds",
    "gpuh": "gpu_seconds",
    "second": "seconds",
    "seconds": "seconds",
    "minute": "seconds",
    "minutes": "seconds",
    "hour": "seconds",
    "hours": "seconds",
}
_SCALE = {"gpu_seconds": 3600.0}
_TIME_SCALE = {"minute": 60.0, "minutes": 60.0, "hour": 3600.0, "hours": 3600.0}


@dataclass(frozen=True, slots=True)
class Spent:
    """What a study has used up.

    Attributes:
        trials: trials that were asked for, baselines and repeats included.
        seconds: wall time, preparation included.
        tokens: tokens that trials were evaluated on.
        gpu_seconds: wall time times the GPUs that were held meanwhile.
    """

    trials: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    gpu_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """``{"trials": ..., "seconds": ..., "tokens": ...}`` and GPU seconds if there were any."""
        spent = {
            "trials": self.trials,
            "seconds": round(self.seconds, 3),
            "tokens": int(self.tokens),
        }
        return spent | ({"gpu_seconds": round(self.gpu_seconds, 3)} if self.gpu_seconds else {})


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits; None is no limit. At least one is set by `parse`.

    Attributes:
        trials: trials, baselines included.
        seconds: wall time, of what precedes the trials too.
        tokens: tokens evaluated.
        gpu_seconds: wall time times GPUs held.
    """

    trials: int | None = None
    seconds: float | None = None
    tokens: float | None = None
    gpu_seconds: float | None = None

    @classmethod
    def parse(cls, texts: str | Iterable[str]) -> Budget:
        """Read one or several limits; of two limits of one kind the smaller counts.

        Args:
            texts: e.g. ``["200 trials", "30m", "2e6 tokens"]``; a bare number counts trials.

        Raises:
            BudgetError: a text is no budget, or allows no trial at all.
        """
        limits: dict[str, float] = {}
        for text in [texts] if isinstance(texts, str) else texts:
            kind, amount = _parse_one(text)
            limits[kind] = min(amount, limits.get(kind, math.inf))
        if not limits:
            raise BudgetError(f"A study needs a budget, but none was given. Examples: {_EXAMPLES}.")
        trials = limits.pop("trials", None)
        return cls(trials=None if trials is None else int(trials), **limits)

    @property
    def untimed(self) -> Budget:
        """Without the limits of time."""
        return replace(self, seconds=None, gpu_seconds=None)

    @property
    def timed(self) -> Budget:
        """With nothing but the limits of time."""
        return replace(self, trials=None, tokens=None)

    @property
    def is_limited(self) -> bool:
        """True if there is any limit."""
        return any(getattr(self, f.name) is not None for f in fields(self))

    def exhausted(self, spent: Spent) -> bool:
        """True if any limit is reached."""
        return self.fraction(spent) >= 1.0

    def fraction(self, spent: Spent) -> float:
        """Share of the scarcest limit that is used up, 0 to 1."""
        shares = (used / limit for _, used, limit in self._pairs(spent))
        return min(1.0, max(shares, default=0.0))

    def remaining(self, spent: Spent) -> str:
        """What is left, for people: ``12 trials, 3m 20s``."""
        left = ((name, max(0.0, limit - used)) for name, used, limit in self._pairs(spent))
        return ", ".join(_REMAINING[name](amount) for name, amount in left)

    def _pairs(self, spent: Spent) -> list[tuple[str, float, float]]:
        triples = ((f.name, getattr(spent, f.name), getattr(self, f.name)) for f in fields(self))
        return [(name, used, limit) for name, used, limit in triples if limit is not None]


def _parse_one(text: str) -> tuple[str, float]:
    """Kind (a field of `Budget`) and amount."""
    if _DURATION.match(text):
        kind = "seconds"
        amount = sum(float(n) * _SECONDS[unit] for n, unit in _DURATION_PART.findall(text))
    else:
        kind, amount = _parse_amount(text)
    if not (math.isfinite(amount) and amount > 0) or (kind == "trials" and amount < 1):
        raise BudgetError(
            f"A budget must allow at least one trial, but got {text!r}. Examples: {_EXAMPLES}."
        )
    if kind == "trials" and amount % 1:
        raise BudgetError(
            f"Trials are counted in whole numbers, but got {text!r}. Examples: {_EXAMPLES}."
        )
    return kind, amount


def _parse_amount(text: str) -> tuple[str, float]:
    match = _AMOUNT.match(text)
    if match is None:
        raise BudgetError(
            f"A budget is an amount with a unit, but got {text!r}. Examples: {_EXAMPLES}."
        )
    unit = match[2].lower()
    if unit not in _UNITS:
        raise BudgetError(
            f"Unknown unit {match[2]!r} of the budget {text!r}. "
            f"{nearest(unit, ['d', 'h', 'm', 's', *filter(None, _UNITS)])} Examples: {_EXAMPLES}."
        )
    kind = _UNITS[unit]
    amount = float(match[1]) * _SCALE.get(kind, 1.0) * _TIME_SCALE.get(unit, 1.0)
    return kind, amount


def duration(seconds: float) -> str:
    """``1h 2m 3s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "m"), (rest, "s")]
    return " ".join(f"{n}{unit}" for n, unit in parts if n) or "0s"


_REMAINING: Mapping[str, Callable[[float], str]] = {
    "trials": lambda n: f"{n:.0f} trial{'' if n == 1 else 's'}",
    "seconds": duration,
    "tokens": lambda n: f"{n:,.0f} tokens",
    "gpu_seconds": lambda n: f"{n / 3600:.2g} GPU-hours",
}
