"""Predicted damage layer by layer: a table for terminals, and a page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from autocompress.report.html import short_model_name
from autocompress.report.layers import short_names
from autocompress.report.picture import Scale, log_ticks

_MOST_LABELS = 6
_ROW, _TOP, _LEFT, _WIDTH = 16, 92, 240, 980
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")


def sensitivity_table(document: Mapping[str, Any]) -> Table:
    """One row per choice, one column per option label, most fragile choices in place.

    Args:
        document: of `workflows.profile.Profile.to_json`.
    """
    table = document["table"]
    labels = shown_labels(table)
    shown = Table(title=f"Predicted damage of {document['model']} ({document['unit']})")
    for heading in ("layer", "role"):
        shown.add_column(heading)
    for label in labels:
        shown.add_column(label, justify="right")
    for name, role, damages in _rows(table):
        cells = (f"{damages[label]:.2e}" if label in damages else "" for label in labels)
        shown.add_row(name, role, *cells)
    return shown


def shown_labels(table: Mapping[str, Any]) -> list[str]:
    """At most six labels of options, from the fewest bytes to the most, the base left out.

    Labels are ordered by the mean place that they have among the options of a choice.
    """
    places: dict[str, list[float]] = {}
    for labels, damages in zip(table["labels"], table["damage"], strict=True):
        for level, (label, damage) in enumerate(zip(labels, damages, strict=True)):
            if label != "base" and damage > 0:
                places.setdefault(label, []).append(level / len(labels))
    ordered = sorted(places, key=lambda label: (sum(places[label]) / len(places[label]), label))
    if len(ordered) <= _MOST_LABELS:
        return ordered
    step = (len(ordered) - 1) / (_MOST_LABELS - 1)
    return [ordered[round(i * step)] for i in range(_MOST_LABELS)]


def sensitivity_page(document: Mapping[str, Any]) -> str:
    """A self-contained HTML page: one line per choice, a dot per option, damage on a log scale."""
    table = document["table"]
    title = f"Sensitivity of {short_model_name(document['model'])}"
    about = (
        f"{document['task']}, {document['space']} space, {document['tokens']:,} held-out "
        f"tokens; predicted damage of each layer alone, {document['unit']}, log scale"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        "<style>body{font:14px system-ui,sans-serif;margin:24px;background:#fff;color:#222}"
        "text{font-size:11px;fill:#333}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>{_svg(table)}</body></html>\n"
    )


def _svg(table: Mapping[str, Any]) -> str:
    labels, rows = shown_labels(table), list(_rows(table))
    values = [d for _, _, damages in rows for label, d in damages.items() if label in labels]
    positive = [value for value in values if value > 0] or [1.0]
    x = Scale(min(positive) / 2, max(positive) * 2, _LEFT, _WIDTH - 20, is_log=True)
    height = _TOP + _ROW * len(rows) + 20
    return "".join(
        [
            f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">',
            *_legend(labels),
            *_grid(x, height),
            *(_line(i, row, labels, x) for i, row in enumerate(rows)),
            "</svg>",
        ]
    )


def _legend(labels: Sequence[str]) -> list[str]:
    return [
        f'<circle cx="{20 + 320 * (i % 3)}" cy="{16 + 18 * (i // 3)}" r="4" fill="{colour}"/>'
        f'<text x="{30 + 320 * (i % 3)}" y="{20 + 18 * (i // 3)}">{html.escape(label)}</text>'
        for i, (label, colour) in enumerate(zip(labels, _COLOURS, strict=False))
    ]


def _grid(x: Scale, height: int) -> list[str]:
    powers = [t for t in log_ticks(x.low, x.high) if math.log10(t).is_integer()]
    return [
        f'<line x1="{x(t)}" x2="{x(t)}" y1="{_TOP - 10}" y2="{height - 20}" stroke="#ddd"/>'
        f'<text x="{x(t)}" y="{_TOP - 16}" text-anchor="middle">{t:g}</text>'
        for t in powers or log_ticks(x.low, x.high)
    ]


def _line(index: int, row: tuple[str, str, dict[str, float]], labels: list[str], x: Scale) -> str:
    name, role, damages = row
    y = _TOP + _ROW * index + _ROW / 2
    dots = "".join(
        f'<circle cx="{x(damages[label])}" cy="{y}" r="4" fill="{colour}">'
        f"<title>{html.escape(f'{name}: {label} {damages[label]:.3g}')}</title></circle>"
        for label, colour in zip(labels, _COLOURS, strict=False)
        if damages.get(label, 0) > 0
    )
    text = html.escape(f"{name} ({role})")
    return f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{text}</text>{dots}'


def _rows(table: Mapping[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """Short name, role and damage by label of every choice."""
    parts = zip(
        short_names(table["names"]), table["roles"], table["labels"], table["damage"], strict=True
    )
    return [
        (name, role, dict(zip(labels, damages, strict=True)))
        for name, role, labels, damages in parts
    ]
