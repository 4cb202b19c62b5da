"""`report.html`: one self-contained page about a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.core import STORAGE, TrialResult, cost_of, short_name
from autocompress.core.errors import RunDirectoryError
from autocompress.core.files import write_atomically
from autocompress.core.objectives import takes_no_more
from autocompress.fronts import FrontDocument, Member, Verdict, comparison_summary
from autocompress.report import formats
from autocompress.report.page_data import axis_of, page_data, trial_summary

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT_FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
_NOT_IN_PROVENANCE = frozenset({"layer_bits", "cost_efficiency"})
_TELLING = 0.005  # share of bytes, or retained quality, that a headline is about
_LEAST_SHOWN = 0.001  # in three decimals


def render_report(
    document: FrontDocument, trials: Sequence[TrialResult], provenance: Mapping[str, Any]
) -> str:
    """The page as text. It loads nothing: scripts, styles and data are inside.

    Args:
        document: the published front. The heat map needs ``layer_bits`` among its study's
            details (`report.layers.layer_bits` computes it).
        trials: the journal.
        provenance: scalars and groups (mappings) of scalars, shown as they are.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    data = json.dumps(page_data(document, trials), allow_nan=False, separators=(",", ":"))
    study = document.study
    return (
        environment()
        .get_template("report.html")
        .render(
            document=document,
            study=study,
            model_name=short_model_name(study.model),
            lede=lede(document),
            tiles=tiles(document),
            beaten_baselines=_beaten_baselines(document),
            metric_names=_metric_names(document),
            compared=comparison_summary(document.comparisons, document.objectives),
            corner=corner_of(document),
            member_names={m.id: m.name or m.id[:8] for m in document.members},
            resource_origins=_origins(document),
            summary=trial_summary(trials),
            groups=_groups(document, provenance),
            version=version("autocompress"),
            # "<" is escaped so that no text can close the script element.
            data=Markup(data.replace("<", "\\u003c")),
            plotly=Markup(get_plotlyjs()),
        )
    )


def _origins(document: FrontDocument) -> dict[str, str]:
    """Where each cost is from: that of the base, then others where models differ in it."""
    shown = [document.base.resources, *(m.resources for m in document.members)]
    return {
        name: "; ".join(dict.fromkeys(found[name].origin for found in shown if name in found))
        for name in document.base.resources
    }


def write_report(
    path: Path,
    document: FrontDocument,
    trials: Sequence[TrialResult],
    provenance: Mapping[str, Any],
) -> Path:
    """Write the page by atomic rename.

    Args:
        path: the run directory, or the file itself.
        document: the published front.
        trials: the journal.
        provenance: as for `render_report`.

    Returns:
        The file.

    Raises:
        RunDirectoryError: it cannot be written; an earlier page stays.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    text = render_report(document, trials, provenance)
    try:
        write_atomically(file, text)
    except OSError as error:
        raise RunDirectoryError(
            f"{file} cannot be written ({error.strerror or error}). Next step: check free space "
            "and permissions of the directory."
        ) from error
    return file


@cache
def environment() -> Environment:
    """Templates of this package; everything is escaped unless marked safe."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        axis=axis_of,
        size=formats.size,
        significant=formats.significant,
        fixed=formats.fixed,
        duration=formats.duration,
        count=formats.count,
        words=lambda name: name.replace("_", " "),
    )
    env.globals.update(plus_minus=formats.plus_minus, signed=formats.signed, cost=formats.cost)
    return env


def short_model_name(model: str) -> str:
    """The part of a path, hub id or ``package:`` source that tells models apart."""
    if model.startswith("package:"):
        return model.removeprefix("package:").partition("/")[0]
    return model.rstrip("/").rpartition("/")[2] or model


def lede(document: FrontDocument) -> str:
    """One sentence that says what came out."""
    members = document.members
    if not members:
        return "No trial gave a finite measurement, so the front is empty."
    models = "model" if len(members) == 1 else "models"
    axes = ["size" if name == STORAGE else _word(name) for name in document.objectives.resources]
    beaten = f"both {axes[0]} and quality" if len(axes) == 1 else f"{', '.join(axes)} and quality"
    ranges = " and ".join(_range(document, name) for name in document.objectives.resources)
    base = " and ".join(
        formats.cost(name, cost_of(document.base, name)) for name in document.objectives.resources
    )
    text = (
        f"{len(members)} measured {models}, {ranges}, that no other one beats in {beaten}. The "
        f"base model takes {base}."
    )
    best = document.most_cost_efficient
    if best is None:
        return text
    return (
        f"{text} The most cost-efficient one is {best.size_reduction:.1f}× smaller and retains "
        f"{_retained(best)} of its quality."
    )


def _range(document: FrontDocument, resource: str) -> str:
    """From the least to the most that a member takes."""
    amounts = [cost_of(member, resource) for member in document.members]
    low, high = formats.cost(resource, min(amounts)), formats.cost(resource, max(amounts))
    return f"from {low.removesuffix(' per token')} to {high}"


def corner_of(document: FrontDocument) -> str:
    """The reference point in words: ``quality loss 1, 1× base bytes``."""
    corner = document.reference_point
    relative = (f"{value:g}× base {_word(name)}" for name, value in corner.relative.items())
    return ", ".join([f"quality loss {corner.quality_loss:g}", *relative])


def _word(resource: str) -> str:
    return short_name(resource).replace("_", " ")


def tiles(document: FrontDocument) -> list[dict[str, str]]:
    """Key figures: each a label, a value and a line that explains it."""
    found = []
    for label, member in (
        ("Best cost efficiency", document.most_cost_efficient),
        ("Knee", document.knee),
    ):
        if member is not None:
            found.append(
                {
                    "label": label,
                    "value": f"{member.size_reduction:.1f}× smaller",
                    "detail": f"{_retained(member)} retained at "
                    f"{formats.size(member.storage_bytes)} · {member.id[:8]}",
                }
            )
    against = _against_baseline(document)
    if against:
        found.append(against)
    found.append(
        {
            "label": "Hypervolume",
            "value": formats.fixed(document.hypervolume),
            "detail": f"reference: {corner_of(document)}",
        }
    )
    return found


def _against_baseline(document: FrontDocument) -> dict[str, str] | None:
    """What the front has over the best uniform baseline: size at its quality, else quality.

    Of the main resource where that is not size; at no more of the others.
    """
    floor = document.study.quality_floor or 0.0
    rivals = [b for b in document.baselines if b.quality.retained >= floor]
    if not rivals:
        return None
    objectives = document.objectives
    costs, main = objectives.costs, objectives.main
    rival = max(rivals, key=lambda b: (-costs(b)[0], b.id))
    quality, (limit, *others) = rival.quality.retained, costs(rival)
    fitting = [m for m in document.members if takes_no_more(costs(m)[1:], others)]
    as_good = [costs(m)[0] for m in fitting if m.quality.retained >= quality]
    as_cheap = [m.quality.retained for m in fitting if costs(m)[0] <= limit]
    saved = 1 - min(as_good, default=limit) / limit
    gained = max(as_cheap, default=quality) - quality
    held = f"its {_retained(rival)} retained at {formats.cost(main, limit)}"
    less = "smaller" if main == STORAGE else f"less {_word(main)}"
    label = f"Against {rival.name}"
    if saved >= _TELLING:
        found = f"{saved:.0%} {less}", f"at no less quality than {held}"
    elif gained >= _TELLING or _is_better(document, rival):
        more = f"{gained:+.{3 if gained >= _LEAST_SHOWN else 5}f} retained"
        found = more, f"at no more {objectives.words} than {held}"
    else:
        cheaper = "smaller" if main == STORAGE else "cheaper"
        found = "no gain", f"no member is clearly {cheaper} or better than {held}"
    return {"label": label, "value": found[0], "detail": found[1]}


def _is_better(document: FrontDocument, baseline: Member) -> bool:
    """The front is significantly better than a baseline, by however little."""
    return any(
        c.baseline == baseline.name and c.verdict is Verdict.BETTER for c in document.comparisons
    )


def _retained(member: Member) -> str:
    return formats.plus_minus(member.quality.retained, member.quality.standard_error)


def _beaten_baselines(document: FrontDocument) -> list[Member]:
    on_front = {member.id for member in document.members}
    return [b for b in document.baselines if b.id not in on_front]


def _metric_names(document: FrontDocument) -> list[str]:
    names = {n for m in (*document.members, *document.baselines) for n in m.quality.metrics}
    return sorted(names)[:3]


def _groups(document: FrontDocument, provenance: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Provenance by group: what was searched, then what the run recorded."""
    study = {k: v for k, v in document.study.to_json().items() if k not in _NOT_IN_PROVENANCE}
    groups: dict[str, dict[str, str]] = {"search": {}, "run": {}}
    for first, values in (("search", study), ("run", provenance)):
        for name, value in values.items():
            if isinstance(value, Mapping):
                group = groups.setdefault(name, {})
                group.update({str(k): _text(v) for k, v in value.items()})
            else:
                groups[first][name] = _text(value)
    return {name: values for name, values in groups.items() if values}


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Mapping):
        return " · ".join(f"{str(k).replace('_', ' ')} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return json.dumps(value, default=str)
