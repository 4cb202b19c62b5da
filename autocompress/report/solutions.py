"""The table that `autocompress solve` prints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autocompress.core import LATENCY, STORAGE, Allocation
from autocompress.report import formats

_MOST_SCHEMES = 3


class Solved(Protocol):
    """What is read of a solution."""

    @property
    def allocation(self) -> Allocation:
        """The layers' schemes."""
        ...

    @property
    def damage(self) -> float:
        """Predicted."""
        ...

    @property
    def low(self) -> float:
        """Lower end of its range."""
        ...

    @property
    def high(self) -> float:
        """Upper end of its range."""
        ...

    @property
    def resources(self) -> Mapping[str, float]:
        """Totals by name."""
        ...


def solutions_table(solutions: Sequence[Solved]) -> RenderableType:
    """One row per solution, cheapest first: size, time, damage with its range, schemes."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("id", "size", "ms/token", "damage", "range", "most layers"):
        table.add_column(name, justify="left" if name in ("id", "most layers") else "right")
    for solution in solutions:
        table.add_row(
            solution.allocation.digest[:8],
            formats.size(int(solution.resources[STORAGE])),
            formats.significant(solution.resources.get(LATENCY, math.nan)),
            f"{solution.damage:.4g}",
            f"{solution.low:.3g} … {solution.high:.3g}",
            _schemes(solution.allocation),
        )
    note = Text("Predicted from the search's trials, not measured.", style="dim")
    return Group(table, note)


def _schemes(allocation: Allocation) -> str:
    """The schemes of most layers, shortened: ``61 × gptq 4, 40 × gptq 3, 25 more``."""
    counts = Counter(
        " + ".join(_short(stage.method, dict(stage.options)) for stage in scheme.stages)
        for scheme in allocation.values()
    )
    common = counts.most_common(_MOST_SCHEMES)
    rest = sum(counts.values()) - sum(n for _, n in common)
    words = [f"{n} × {name}" for name, n in common]
    return ", ".join([*words, *([f"{rest} more"] if rest else [])])


def _short(method: str, options: Mapping[str, object]) -> str:
    for name in ("bits", "sparsity", "rank", "parameter_ratio"):
        if name in options:
            return f"{method} {options[name]}"
    return method
