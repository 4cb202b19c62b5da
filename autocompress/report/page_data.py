"""What the report page draws, as plain JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autocompress.core import STORAGE, Quality, Resources, TrialResult
from autocompress.core.nullable import or_null
from autocompress.fronts import (
    FrontDocument,
    Member,
    MemberQuality,
    non_dominated,
    relative_hypervolume,
)
from autocompress.report.layers import LayerBits, block_of, short_names


def page_data(document: FrontDocument, trials: Sequence[TrialResult]) -> dict[str, Any]:
    """Everything that the page's script needs."""
    best = document.most_cost_efficient
    return {
        "base": _base(document),
        "optimized": list(map(axis_of, document.objectives.resources)),
        "members": [_entry(m, best) for m in document.members],
        "baselines": [_entry(m, best) for m in document.baselines],
        "trials": _other_trials(document, trials),
        "floor": document.study.quality_floor,
        "heatmap": heat_map(document),
        "hypervolume": hypervolume_history(document, trials),
    }


def axis_of(resource: str) -> str:
    """What the page's axes call a resource."""
    return "bytes" if resource == STORAGE else resource


def heat_map(document: FrontDocument) -> dict[str, Any] | None:
    """Bits per weight by member (rows, in the order of the front) and layer (columns).

    None if the study did not record `layer_bits` or there are no members.
    """
    table: LayerBits | None = document.study.details.get("layer_bits")
    if not table or not document.members:
        return None
    names = list(table)
    rows = document.members
    schemes = [[m.allocation.get(name, "base") for name in names] for m in rows]
    blocks = [block_of(name) for name in names]
    return {
        "layers": names,
        "labels": short_names(names),
        "starts": [i for i in range(1, len(names)) if blocks[i] != blocks[i - 1]],
        "members": [m.id for m in rows],
        "schemes": schemes,
        "bits": [
            [table[name].get(text) for name, text in zip(names, row, strict=True)]
            for row in schemes
        ],
    }


def hypervolume_history(
    document: FrontDocument, trials: Sequence[TrialResult]
) -> dict[str, list[float]]:
    """Hypervolume after each trial, on search tokens, in the units of the document's own.

    Returns:
        ``number`` of the trial, ``all`` trials up to it, ``baselines`` up to it alone.
    """
    history: dict[str, list[float]] = {"number": [], "all": [], "baselines": []}
    front: list[tuple[float, ...]] = []
    uniform: list[tuple[float, ...]] = []
    costs = document.objectives.costs
    for trial in sorted(trials, key=lambda t: t.request.number):
        if trial.is_complete and trial.metrics is not None:
            point = (trial.metrics.quality.retained, *costs(trial.metrics))
            front = _reduced([*front, point])
            uniform = [*uniform, point] if trial.request.is_baseline else uniform
        history["number"].append(trial.request.number)
        for name, points in (("all", front), ("baselines", uniform)):
            volume = relative_hypervolume(points, costs(document.base), document.reference_point)
            history[name].append(round(volume, 6))
    return history


def trial_summary(trials: Iterable[TrialResult]) -> dict[str, Any]:
    """How many trials ended how, and those that failed or have notes, in order."""
    ordered = sorted(trials, key=lambda t: t.request.number)
    counts = Counter(trial.status.value for trial in ordered)
    return {
        "counts": dict(sorted(counts.items(), key=lambda item: (item[0] != "complete", item[0]))),
        "failed": [trial for trial in ordered if trial.has_failed],
        "notes": [trial for trial in ordered if trial.notes],
        "seconds": sum(trial.seconds for trial in ordered),
    }


def _reduced(points: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    mask = non_dominated([(-retained, *costs) for retained, *costs in points])
    return [point for point, keep in zip(points, mask, strict=True) if keep]


def _base(document: FrontDocument) -> dict[str, Any]:
    base = document.base
    return {
        "bytes": base.storage_bytes,
        **_quality(base.quality),
        **_resources(base.resources),
    }


def _entry(member: Member, best: Member | None) -> dict[str, Any]:
    return {
        "id": member.id,
        "name": member.name,
        "bytes": member.storage_bytes,
        "bits": member.bits_per_weight,
        "reduction": member.size_reduction,
        "efficiency": or_null(member.cost_efficiency),
        "knee": member.is_knee,
        "best": best is not None and member.id == best.id,
        **_quality(member.quality),
        **_resources(member.resources),
    }


def _quality(quality: MemberQuality | Quality) -> dict[str, Any]:
    return {
        "retained": or_null(quality.retained),
        "error": or_null(quality.standard_error),
        "metrics": {
            name: [or_null(m.value), or_null(m.standard_error)]
            for name, m in quality.metrics.items()
        },
    }


def _resources(resources: Resources) -> dict[str, Mapping[str, float | None]]:
    return {"resources": {name: or_null(r.value) for name, r in resources.items()}}


def _other_trials(document: FrontDocument, trials: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Measured trials that are neither on the front nor a baseline."""
    shown = {m.id for m in (*document.members, *document.baselines)}
    found = []
    for trial in trials:
        allocation = trial.request.allocation
        if trial.metrics is None or not len(allocation) or allocation.digest in shown:
            continue
        found.append(
            {
                "number": trial.request.number,
                "source": trial.request.source,
                "bytes": trial.metrics.storage_bytes,
                **_quality(trial.metrics.quality),
                **_resources(trial.metrics.resources),
            }
        )
    return found
