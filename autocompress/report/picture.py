"""A still picture of a front as SVG, for READMEs and pages without scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.core import LATENCY, STORAGE, cost_of
from autocompress.core.errors import NoAnswerError
from autocompress.core.objectives import Costed
from autocompress.fronts import FrontDocument, Member
from autocompress.report import formats
from autocompress.report.html import environment, short_model_name

WIDTH, HEIGHT = 920, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 28, 104, 62
_LABEL_WIDTH, _LABEL_HEIGHT = 6.6, 15.0
"""Of one letter and one line of a label, in pixels; a little generous."""

_X_AXES = {
    STORAGE: (1e6, "storage, MB"),
    LATENCY: (1.0, "time per token, ms"),
    "bytes_moved_per_token": (1e6, "bytes moved per token, MB"),
    "macs_per_token": (1e6, "million MACs per token"),
}
"""Unit and title of the horizontal axis, by resource."""

_FEWEST_TICKS = 3
_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from data to pixels; of logarithms if `is_log`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of `value`, rounded to a tenth."""
        low, high, at = (
            (math.log(self.low), math.log(self.high), math.log(value))
            if self.is_log
            else (self.low, self.high, value)
        )
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 1)


def front_svg(document: FrontDocument, *, lowest_quality: float | None = None) -> str:
    """The front over its main resource (log scale) with baselines, error bars, knee and best.

    Args:
        document: a front with at least one member.
        lowest_quality: bottom of the picture; by default a little below the worst member or
            baseline that retains half of the quality. What lies below is left out.

    Raises:
        NoAnswerError: the front has no members.
    """
    if not document.members:
        raise NoAnswerError(
            "A front without members cannot be drawn, and no compressed model was measured. Next "
            "step: see the failed trials in trials.jsonl, or repeat the search with --resume and "
            "a larger --budget."
        )
    low = _lowest(document) if lowest_quality is None else lowest_quality
    members = [m for m in document.members if m.quality.retained >= low]
    baselines = [b for b in document.baselines if b.quality.retained >= low]
    x, y = _scales(document, [*members, *baselines], low)
    unit, title = _X_AXES.get(document.objectives.main, (1.0, document.objectives.words))
    return (
        environment()
        .get_template("picture.html")
        .render(
            width=WIDTH,
            height=HEIGHT,
            title=f"Measured front of {short_model_name(document.study.model)}",
            subtitle=_subtitle(document),
            x_ticks=_x_ticks(x.scale, unit),
            x_title=title,
            y_ticks=[(y(t), f"{t:.{_decimals(low)}f}") for t in linear_ticks(y.low, y.high)],
            frame={"left": _LEFT, "right": WIDTH - _RIGHT, "top": _TOP, "bottom": HEIGHT - _BOTTOM},
            stairs=_stairs(members, x, y),
            members=[_mark(m, x, y) for m in members],
            baselines=[_mark(b, x, y) for b in baselines],
            base={"x": x(document.base), "y": y(1.0)},
            labels=_labels(document, members, baselines, x, y),
            rings=_rings(document, members, x, y),
        )
    )


def write_picture(path: Path, document: FrontDocument) -> Path:
    """Write `front_svg` to `path`."""
    path.write_text(front_svg(document), encoding="utf-8")
    return path


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` (both above 0), about evenly spaced on a log scale."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in _STEPS]
    shown = [tick for tick in ticks if low <= tick <= high]
    return (
        [t for t in shown if t / 10 ** math.floor(math.log10(t)) in (1, 2, 5)]
        if len(shown) > 10
        else shown
    )


def _x_ticks(scale: Scale, unit: float) -> list[tuple[float, str]]:
    low, high = scale.low / unit, scale.high / unit
    ticks = log_ticks(low, high)
    if len(ticks) < _FEWEST_TICKS:  # a narrow range
        ticks = linear_ticks(low, high)
    return [(scale(tick * unit), f"{tick:g}") for tick in ticks]


def linear_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Multiples of a round step from `low` to `high`, at most `most` of them."""
    rough = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(s * magnitude for s in (1, 2, 5, 10) if s * magnitude >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _lowest(document: FrontDocument) -> float:
    values = [m.quality.retained for m in (*document.members, *document.baselines)]
    best = max(values)
    kept = [value for value in values if value >= best / 2]
    return min(kept) - 0.08 * max(1.0 - min(kept), 0.02)


def _decimals(low: float) -> int:
    return 2 if low < 0.95 else 3


@dataclass(frozen=True, slots=True)
class _Across:
    """Horizontal place of a model: its amount of the main resource."""

    resource: str
    scale: Scale

    def __call__(self, model: Costed) -> float:
        return self.scale(cost_of(model, self.resource))


def _scales(document: FrontDocument, shown: list[Member], low: float) -> tuple[_Across, Scale]:
    main = document.objectives.main
    models: list[Costed] = [*shown, document.base]
    sizes = [cost_of(model, main) for model in models]
    top = max([1.0, *(m.quality.retained for m in shown)])
    margin = (max(sizes) / min(sizes)) ** 0.05 if max(sizes) > min(sizes) else 1.1
    return (
        _Across(
            main,
            Scale(min(sizes) / margin, max(sizes) * margin, _LEFT, WIDTH - _RIGHT, is_log=True),
        ),
        Scale(low, top + 0.07 * (top - low), HEIGHT - _BOTTOM, _TOP),
    )


def _subtitle(document: FrontDocument) -> str:
    study = document.study
    return (
        f"{study.task}, {study.space} space, {study.budget_spent.trials} trials in "
        f"{formats.duration(study.budget_spent.seconds)}; measured on held-out tokens, "
        "bars: one standard error"
    )


def _stairs(members: list[Member], x: _Across, y: Scale) -> str:
    """Path of the best quality within each amount of the main resource."""
    path, best = "", -math.inf
    for member in sorted(members, key=lambda m: (x(m), -m.quality.retained)):
        if member.quality.retained <= best:
            continue
        best = member.quality.retained
        at = x(member)
        path += f"H{at}V{y(best)}" if path else f"M{at} {y(best)}"
    return f"{path}H{WIDTH - _RIGHT}" if path else ""


def _mark(member: Member, x: _Across, y: Scale) -> dict[str, float]:
    quality = member.quality
    error = quality.standard_error if math.isfinite(quality.standard_error) else 0.0
    return {
        "x": x(member),
        "y": y(quality.retained),
        "high": y(quality.retained + error),
        "low": y(max(quality.retained - error, y.low)),
    }


def _rings(
    document: FrontDocument, members: list[Member], x: _Across, y: Scale
) -> list[dict[str, Any]]:
    marked = (("knee", document.knee, 9.5), ("best", document.most_cost_efficient, 13.5))
    shown = {m.id for m in members}
    return [
        {"kind": kind, "radius": radius, **_mark(member, x, y)}
        for kind, member, radius in marked
        if member is not None and member.id in shown
    ]


def _labels(
    document: FrontDocument, members: list[Member], baselines: list[Member], x: _Across, y: Scale
) -> list[dict[str, Any]]:
    """Text beside what deserves it, most important first; one that fits nowhere is left out."""
    knee, best = document.knee, document.most_cost_efficient
    wanted: list[tuple[str, str, float, float]] = []
    if best is not None and best in members:
        text = f"best cost efficiency: {best.size_reduction:.1f}× smaller, {_kept(best)}"
        wanted.append(("best", text, x(best), y(best.quality.retained)))
    if knee is not None and knee in members and (best is None or knee.id != best.id):
        text = f"knee: {knee.size_reduction:.1f}× smaller, {_kept(knee)}"
        wanted.append(("knee", text, x(knee), y(knee.quality.retained)))
    amount = formats.cost(x.resource, cost_of(document.base, x.resource))
    base = f"base model, {amount}"
    wanted.append(("base", base, x(document.base), y(1.0)))
    wanted += [("baseline", b.name, x(b), y(b.quality.retained)) for b in baselines]
    points = [(x(m), y(m.quality.retained)) for m in (*members, *baselines)]
    placed: list[_Box] = []
    found = []
    for kind, text, at_x, at_y in wanted:
        box = _place(text, at_x, at_y, placed, points)
        if box is not None:
            placed.append(box)
            found.append({"kind": kind, "text": text, "x": box.left, "y": box.bottom - 4})
    return found


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: _Box) -> bool:
        return not (
            self.right < other.left
            or other.right < self.left
            or self.bottom < other.top
            or other.bottom < self.top
        )

    def holds(self, point: tuple[float, float]) -> bool:
        margin = 5.0
        return (
            self.left - margin < point[0] < self.right + margin
            and self.top - margin < point[1] < self.bottom + margin
        )


def _place(
    text: str, x: float, y: float, placed: list[_Box], points: list[tuple[float, float]]
) -> _Box | None:
    """The first free place around a point: right below, right, left above, left."""
    width = _LABEL_WIDTH * len(text)
    frame = _Box(_LEFT, 56, WIDTH - 6, HEIGHT - _BOTTOM)
    for dx, dy in (
        (14, 14), (16, -2), (14, 26), (-14 - width, -14), (-16 - width, 0), (14, 40), (-width, -24),
    ):  # fmt: skip
        top = y + dy - _LABEL_HEIGHT / 2
        box = _Box(round(x + dx, 1), round(top, 1), round(x + dx + width, 1), top + _LABEL_HEIGHT)
        inside = frame.left <= box.left and box.right <= frame.right and box.bottom <= frame.bottom
        others = [p for p in points if p != (x, y)]
        if inside and not any(map(box.overlaps, placed)) and not any(map(box.holds, others)):
            return box
    return None


def _kept(member: Member) -> str:
    quality = member.quality
    return f"retains {formats.plus_minus(quality.retained, quality.standard_error)}"
