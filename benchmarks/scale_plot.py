"""Line charts side by side, as one SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from autocompress.report.picture import Scale, linear_ticks, log_ticks

COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed")
WIDTH, HEIGHT, TOP = 360, 300, 70


@dataclass(frozen=True, slots=True)
class Line:
    """One line; lines of one name share a colour, and the faint ones are dashed."""

    name: str
    points: Sequence[tuple[float, float]]
    is_faint: bool = False


Panel = tuple[str, str, Sequence[Line], bool]
"""Title, name of the horizontal axis (log scale), lines, whether the vertical axis is log."""


def panels(title: str, subtitle: str, drawn: Sequence[Panel]) -> str:
    """The panels side by side under one title."""
    width = WIDTH * len(drawn)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + TOP}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#1f2937">',
        f'<rect width="{width}" height="{HEIGHT + TOP}" fill="#ffffff"/>',
        text(20, 26, title, 'font-size="16" font-weight="600"'),
        text(20, 46, subtitle, 'fill="#6b7280"'),
    ]
    for i, panel in enumerate(drawn):
        parts += [f'<g transform="translate({i * WIDTH} {TOP})">', *_panel(*panel), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def text(x: float, y: float, words: str, attributes: str = "") -> str:
    """A text element."""
    return f'<text x="{x}" y="{y}" {attributes}>{escape(words)}</text>'


def _panel(title: str, axis: str, lines: Sequence[Line], is_log: bool) -> list[str]:
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    left, right, top, bottom = 50, WIDTH - 16, 40, HEIGHT - 40
    x = Scale(min(xs), max(xs), left, right, is_log=True)
    low, high = (min(ys), max(ys)) if is_log else (0.0, max(*ys, 1e-9) * 1.05)
    y = Scale(low, high, bottom, top, is_log=is_log)
    parts = [text(left, 10, title, 'font-weight="600"')]
    for tick in log_ticks(low, high)[::2] if is_log else linear_ticks(low, high, 5):
        parts.append(f'<path d="M{left} {y(tick)}H{right}" stroke="#e5e7eb"/>')
        parts.append(text(left - 6, y(tick) + 4, f"{tick:g}", 'text-anchor="end"'))
    for tick in sorted(set(xs)):
        parts.append(text(x(tick), bottom + 18, f"{tick:g}", 'text-anchor="middle"'))
    parts.append(text((left + right) / 2, bottom + 36, axis, 'text-anchor="middle"'))
    names = list(dict.fromkeys(line.name for line in lines))
    for line in lines:
        path = "M" + "L".join(f"{x(a)} {y(b)}" for a, b in line.points)
        dashes = ' stroke-dasharray="5 4" opacity="0.7"' if line.is_faint else ""
        colour = COLOURS[names.index(line.name) % len(COLOURS)]
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
    at = left
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        parts.append(text(at, 28, name, f'fill="{colour}"'))
        at += 7 * len(name) + 14  # about the width of the letters
    return parts
