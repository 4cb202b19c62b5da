"""Writes the results of the README, and the picture of each run, from the committed fronts.

``python benchmarks/readme_results.py`` rewrites the block between the markers; with ``--check`` it
only says whether the README is up to date (the test suite does that too).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from autocompress.fronts.document import FrontDocument, Member

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
RUNS = {"demo": "all-MiniLM-L6-v2", "gemma-3-270m": "Gemma 3 270M"}
FLOORS = (0.99, 0.98, 0.95, 0.9, 0.8)


def block() -> str:
    """The Markdown between the markers."""
    return "\n\n".join([*(section(name, title) for name, title in RUNS.items()), demo_time()])


def demo_time() -> str:
    """How long the commands of the demo took together."""
    path = ROOT / "results" / "demo" / "timings.json"
    seconds = round(sum(json.loads(path.read_text(encoding="utf-8"))["seconds"].values()))
    return (
        f"The demo's commands took {seconds // 60} min {seconds % 60} s together "
        "([timings.json](results/demo/timings.json))."
    )


def section(name: str, title: str) -> str:
    """One run: what it searched, and the smallest model that retains at least so much."""
    document = FrontDocument.read(ROOT / "results" / name)
    study, base = document.study, document.base
    spent = study.budget_spent
    head = (
        f"**{title}**, space `{study.space}`, {spent.trials} trials, {spent.tokens:,} tokens "
        f"([front.json](results/{name}/front.json)); base {megabytes(base.storage_bytes)}. The "
        "smallest model that retains at least:"
    )
    lines = [
        "| retained quality | searched | | best uniform | |",
        "|---|---|---|---|---|",
        *(row(document, floor) for floor in FLOORS),
    ]
    return head + "\n\n" + "\n".join(lines)


def row(document: FrontDocument, floor: float) -> str:
    """The smallest member and the smallest uniform baseline above a floor of quality."""
    ours = smallest(document.members, floor)
    uniform = smallest(document.baselines, floor)
    return f"| ≥ {floor} | {cells(ours)} | {cells(uniform)} |"


def smallest(members: Iterable[Member], floor: float) -> Member | None:
    """The member of fewest bytes whose retained quality reaches the floor."""
    fitting = [m for m in members if m.quality.retained >= floor]
    return min(fitting, key=lambda m: m.storage_bytes, default=None)


def cells(member: Member | None) -> str:
    """Size and quality of a member, as two cells."""
    if member is None:
        return "none | "
    quality = f"{member.quality.retained:.4f} ± {member.quality.standard_error:.4f}"
    name = f"{member.name}, " if member.name else ""
    size = f"{megabytes(member.storage_bytes)} ({member.size_reduction:.2f}×)"
    return f"{name}{size} | {quality}"


def megabytes(n_bytes: int) -> str:
    """Decimal megabytes."""
    return f"{n_bytes / 1e6:.1f} MB"


def updated(text: str) -> str:
    """The README with its results block as the fronts say."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{block()}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Rewrite the README, or check it."""
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if "--check" in arguments:
        print("README results are up to date" if new == text else "README results are stale")
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
