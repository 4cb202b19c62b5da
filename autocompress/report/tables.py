"""Tables for terminals. Each fits 80 columns; wider terminals are not filled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autocompress.core import LATENCY, STORAGE, Resource, cost_of
from autocompress.core.objectives import Costed
from autocompress.fronts import Finalized, FrontDocument, Member, comparison_summary
from autocompress.objectives import Candidate, Check
from autocompress.report import formats

if TYPE_CHECKING:
    from autocompress.cost import (
        DeviceProfile,
    )  # which imports torch, and front must answer at once

_GOOD, _BAD = "green", "red"
_HEADINGS = {
    LATENCY: "ms/token",
    "bytes_moved_per_token": "MB/token",
    "macs_per_token": "MMAC/token",
}


class Verified(Protocol):
    """What `verification_table` reads: name, claimed, reloaded and agreement of each check."""

    @property
    def rows(self) -> Sequence[tuple[str, float, float, bool]]:
        """Of each check."""


def front_table(document: FrontDocument) -> RenderableType:
    """Members, beaten baselines and the base model, cheapest first, then each baseline's rival.

    The first column is what `autocompress export` accepts: the name of a
    baseline, or the start of an id.
    """
    best = document.most_cost_efficient
    on_front = {m.id for m in document.members}
    beaten = [b for b in document.baselines if b.id not in on_front]
    beside = [name for name in document.objectives.resources if name != STORAGE]
    headings = [_HEADINGS[name] for name in beside]
    # What no column is left for is in the table of one member.
    numeric = ("size", *headings) if beside else ("size", "smaller", "bits")
    table = _table("model", *numeric, "retained", "ce", "")
    costs = document.objectives.costs
    for member in sorted([*document.members, *beaten], key=lambda m: (costs(m), m.id)):
        marks = {
            "knee": member.is_knee and member.id in on_front,
            "best ce": best is not None and member.id == best.id,
            "finalized": member.finalized is not None,
            "beaten": member.id not in on_front,
        }
        note = ", ".join(name for name, applies in marks.items() if applies)
        table.add_row(
            Text(member.name or member.id[:8]),
            *_numbers(member, beside),
            Text(note),
            style="dim" if marks["beaten"] else "bold" if marks["best ce"] else "",
        )
    base = document.base
    table.add_section()
    retained = formats.plus_minus(base.quality.retained, base.quality.standard_error)
    numbers = _amounts(base, beside) if beside else ["1.00×", ""]
    table.add_row("base", formats.size(base.storage_bytes), *numbers, retained, "1.00", "")
    spent = document.study.budget_spent
    summary = (
        f"{len(document.members)} of {spent.trials} trials are on the front; hypervolume "
        f"{formats.fixed(document.hypervolume)}; {formats.duration(spent.seconds)}; "
        f"ce = cost efficiency"
    )
    shown: list[RenderableType] = [table, Text(summary, style="dim")]
    return Group(*shown, *_comparisons(document)) if document.comparisons else Group(*shown)


def member_table(member: Member) -> RenderableType:
    """One member: what it is, costs with their origin, and how many layers have which scheme."""
    facts = _facts(
        {
            "id": f"{member.id} {member.name}".strip(),
            "size": f"{formats.size(member.storage_bytes)} ({member.storage_bytes:,} bytes), "
            f"{member.size_reduction:.2f}× smaller",
            "bits per weight": f"{member.bits_per_weight:.2f}",
            "retained quality": _retained(member),
            **{
                _words(name): formats.plus_minus(m.value, m.standard_error)
                for name, m in sorted(member.quality.metrics.items())
            },
            **{
                _words(name): f"{_costed(r)}; {r.origin}"
                for name, r in sorted(member.resources.items())
                if name != "storage_bytes"
            },
            "cost efficiency": _number(member.cost_efficiency),
            **({"finalized": _finalized(member.finalized)} if member.finalized else {}),
        }
    )
    schemes = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    schemes.add_column("scheme", overflow="fold")
    schemes.add_column("layers", justify="right")
    counts: dict[str, int] = {}
    for scheme in member.allocation.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    for scheme, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        schemes.add_row(Text(scheme), str(number))
    return Group(facts, schemes) if counts else facts


def gate_table(candidate: Candidate, checks: Iterable[Check]) -> RenderableType:
    """Each check with its value, threshold and verdict; below, where values are from."""
    table = _table("check", "value", "threshold", "verdict", title=f"gate: {candidate.id[:8]}")
    notes: list[Text] = []
    for check in checks:
        rule = "≥" if check.is_floor else "≤"
        noise = " (within noise)" if check.is_within_noise else ""
        table.add_row(
            Text(_words(check.name)),
            _measured(check.name, check.value, check.standard_error),
            f"{rule} {_measured(check.name, check.threshold, 0.0)}",
            _verdict(check.passed, noise),
        )
        if check.origin:
            notes.append(Text(f"{_words(check.name)}: {check.origin}", style="dim"))
    return Group(table, *notes) if notes else table


def verification_table(verification: Verified) -> RenderableType:
    """Claim against reload."""
    table = _table("check", "claimed", "reloaded", "verdict", title="reload in a fresh process")
    for name, claimed, reloaded, agrees in verification.rows:
        shown = [_exact(name, value) for value in (claimed, reloaded)]
        table.add_row(Text(_words(name)), *shown, _verdict(agrees, ""))
    return table


def evaluation_table(evaluation: Mapping[str, Any]) -> RenderableType:
    """A measured model; takes the JSON document of `autocompress evaluate`."""
    quality = evaluation["quality"]
    rows = {
        "model": str(evaluation["model"]),
        "base": str(evaluation["base"]),
        "task": f"{evaluation['task']} on {evaluation['data']}, {evaluation['tokens']:,} tokens",
        "size": f"{formats.size(evaluation['storage_bytes'])}, "
        f"{evaluation['size_reduction']:.2f}× smaller than the base",
        "retained quality": formats.plus_minus(quality["retained"], quality["standard_error"]),
    }
    if "pooling" in evaluation:
        rows["pooling"] = str(evaluation["pooling"])
    for name, metric in quality["metrics"].items():
        rows[_words(name)] = formats.plus_minus(metric["value"], metric["standard_error"])
    return _facts(rows)


def spaces_table(spaces: Mapping[str, str]) -> RenderableType:
    """Name and description of each search space."""
    return _facts(spaces, header=("space", "description"))


def space_table(summary: Mapping[str, Any]) -> RenderableType:
    """What a space gives on a model; lists and mappings are spelled out."""
    return _facts({_words(name): _spelled(value) for name, value in summary.items()})


def device_table(profile: DeviceProfile) -> RenderableType:
    """A device profile; of measured times, the model, their number and the rest."""
    facts = profile.to_json()
    table = profile.latency
    if table is not None:
        facts["latency"] = f"{table.model} in {table.dtype}"
        facts |= {
            f"{times.n_tokens} token{'s' * (times.n_tokens > 1)}": f"{len(times.layers)} kinds of "
            f"layers timed; all else takes {1e3 * times.rest:.4g} ms"
            for times in table.passes
        }
    return space_table(facts)


def methods_table(methods: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Compression methods: ``name``, ``kind``, ``needs`` and ``summary`` of each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", style="bold", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("needs", no_wrap=True)
    table.add_column("summary", overflow="fold")
    for method in methods:
        table.add_row(*(Text(str(method[key])) for key in ("name", "kind", "needs", "summary")))
    return table


def samplers_table(samplers: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Samplers: name, what each uses to propose trials, and its summary."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("sampler", style="bold", no_wrap=True)
    table.add_column("uses", no_wrap=True)
    table.add_column("summary", overflow="fold")
    for sampler in samplers:
        learns = ["predictions"] if sampler["needs_table"] else []
        learns += ["training"] if sampler["needs_training"] else []
        learns += ["trials"] if sampler["adaptive"] else []
        uses = " and ".join(learns) or "nothing"
        table.add_row(Text(sampler["name"]), Text(uses), Text(sampler["summary"]))
    return table


def _table(first: str, *numeric: str, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title=title)
    table.title_justify = "left"
    table.add_column(first, overflow="fold")
    for name in numeric:
        is_text = name in ("", "verdict")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    return table


def _facts(rows: Mapping[str, str], header: tuple[str, str] | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=header is not None)
    name, value = header or ("", "")
    table.add_column(name, style="bold", overflow="fold", max_width=28)
    table.add_column(value, overflow="fold")
    for key, text in rows.items():
        table.add_row(Text(key), Text(text))
    return table


def _comparisons(document: FrontDocument) -> list[RenderableType]:
    """Each baseline against a searched model at no more cost, and a line that sums up."""
    main = document.objectives.main
    names = {m.id: m.name or m.id[:8] for m in document.members}
    table = _table("baseline", "searched", "saves", "Δ retained", "verdict")
    for compared in document.comparisons:
        difference = compared.difference
        if difference is None:
            numbers = ["–"] * 3
        else:
            retained = difference.retained
            numbers = [
                names.get(compared.member, compared.member[:8]),
                formats.cost(main, compared.saving(main)).removesuffix(" per token"),
                formats.signed(retained.value, retained.standard_error),
            ]
        table.add_row(Text(compared.baseline), *numbers, Text(compared.label))
    return [table, Text(comparison_summary(document.comparisons, document.objectives), style="dim")]


def _numbers(member: Member, beside: Sequence[str]) -> tuple[str, ...]:
    relative = [f"{member.size_reduction:.2f}×", f"{member.bits_per_weight:.2f}"]
    return (
        formats.size(member.storage_bytes),
        *(_amounts(member, beside) if beside else relative),
        _retained(member),
        _number(member.cost_efficiency),
    )


def _amounts(model: Costed, resources: Sequence[str]) -> list[str]:
    """Amounts in the unit of `_HEADINGS`."""
    scales = (1.0 if name == LATENCY else 1e6 for name in resources)
    return [
        formats.significant(cost_of(model, name) / scale)
        for name, scale in zip(resources, scales, strict=True)
    ]


def _finalized(rebuilt: Finalized) -> str:
    before, after = rebuilt.search_damage.value, rebuilt.rebuilt_damage.value
    return (
        f"damage on search tokens {formats.significant(before)} → {formats.significant(after)}; "
        f"{len(rebuilt.changed)} layers by stronger methods; was {rebuilt.searched_as[:8]}"
    )


def _retained(member: Member) -> str:
    return formats.plus_minus(member.quality.retained, member.quality.standard_error)


def _costed(resource: Resource) -> str:
    if resource.unit == "bytes":
        return formats.size(resource.value)
    return f"{formats.significant(resource.value)} {resource.unit}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _measured(name: str, value: float, standard_error: float) -> str:
    if math.isnan(value):
        return "not known"
    if name == "storage_bytes":
        return formats.size(value)
    return formats.plus_minus(value, standard_error)


def _exact(name: str, value: float) -> str:
    return f"{value:,.0f} bytes" if name == "storage_bytes" else f"{value:.6f}"


def _verdict(passed: bool, note: str) -> Text:
    return Text(("pass" if passed else "FAIL") + note, style=_GOOD if passed else _BAD)


def _spelled(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} ({_spelled(number)})" for key, number in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
