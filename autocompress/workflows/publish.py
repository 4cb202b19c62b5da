"""From the trials of a study to the published front: measured again, on report tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core import (
    DEFAULT_OBJECTIVES,
    STORAGE,
    Metrics,
    Objectives,
    Resources,
    TrialRequest,
    TrialResult,
)
from autocompress.core.errors import RunDirectoryError, TrialError
from autocompress.core.objectives import takes_no_more
from autocompress.cost import CostModel
from autocompress.fronts import (
    BaseEntry,
    BudgetSpent,
    Front,
    FrontDocument,
    Member,
    MemberQuality,
    StudySummary,
    contributions,
    paired,
    reference_point,
)
from autocompress.methods import footprint
from autocompress.objectives import CostEfficiency
from autocompress.report.layers import LayerBits, layer_bits
from autocompress.search import Journal, Spent
from autocompress.search.driver import Driver
from autocompress.workflows.session import Progress, Session
from autocompress.workflows.settings import StudyRecord

REPORT_JOURNAL = "report.jsonl"
MOST_MEMBERS = 24
"""Trials of a search's front that are measured on report tokens, beside the baselines."""
BASE_NAME = "base"
_LEAST_DAMAGE = 1e-12


def shortlist(
    results: Sequence[TrialResult], objectives: Objectives = DEFAULT_OBJECTIVES
) -> list[TrialRequest]:
    """What is worth measuring on report tokens: the base, the baselines and the search front.

    Trials that another one beats on damage and all resources on the search tokens are left out; of
    equal allocations the first one counts. A crowded front is thinned out to `MOST_MEMBERS`, the
    best trial at no more cost than each baseline among them. A base and baselines that failed in
    the search, perhaps for a reason that has passed, are tried again.
    """
    complete = [r for r in results if r.is_complete]
    front = Front.of(complete, lambda r: objectives.losses(_metrics(r)))
    proposed = [r for r in front if not r.request.is_baseline]
    rivals = _rivals([r for r in complete if r.request.is_baseline], proposed, objectives)
    kept = thinned(proposed, MOST_MEMBERS, objectives, always=rivals)
    wanted = [r for r in results if r.request.is_baseline and not r.is_early_stopped] + kept
    first = {r.request.allocation: r.request for r in reversed(wanted)}
    return sorted(first.values(), key=lambda request: request.number)


def _rivals(
    baselines: Sequence[TrialResult], proposed: Sequence[TrialResult], objectives: Objectives
) -> set[int]:
    """Numbers of the trials of least damage at no more cost than each baseline."""

    def costs(result: TrialResult) -> tuple[float, ...]:
        return objectives.costs(_metrics(result))

    rivals = set()
    for baseline in baselines:
        fitting = [r for r in proposed if takes_no_more(costs(r), costs(baseline))]
        if fitting:
            best = min(fitting, key=lambda r: _metrics(r).quality.damage.value)
            rivals.add(best.request.number)
    return rivals


def thinned(
    front: Sequence[TrialResult],
    most: int,
    objectives: Objectives = DEFAULT_OBJECTIVES,
    always: Collection[int] = (),
) -> list[TrialResult]:
    """At most so many members of a front, spread over it; the best of each objective stay.

    So do trials whose numbers are in `always`, even if they alone are more.

    One by one the member goes that would be missed least: the smallest volume that it alone
    dominates, over log damage and the resources. With one resource that is the product of the
    resource to its dearer neighbour and of the log damage to its cheaper one.
    """
    kept = sorted(front, key=lambda r: objectives.costs(_metrics(r)))
    while len(kept) > most:
        missed = _missed(kept, objectives)
        missed[[r.request.number in always for r in kept]] = np.inf
        if np.isinf(missed).all():
            break
        del kept[int(missed.argmin())]
    return kept


def _missed(front: Sequence[TrialResult], objectives: Objectives) -> NDArray[np.float64]:
    """How much each would be missed; the best of each objective infinitely."""
    points = np.array([objectives.losses(_metrics(r)) for r in front])
    points[:, 0] = np.log(np.maximum(points[:, 0], _LEAST_DAMAGE))
    missed = contributions(points, reference_point(points))
    missed[points.argmin(axis=0)] = np.inf
    return missed


def measure_on_report_tokens(
    requests: Sequence[TrialRequest], driver: Driver, directory: Path, progress: Progress
) -> tuple[list[TrialResult], bool]:
    """Measure each request on the driver's tokens, going on from an earlier, interrupted run.

    What failed in that run is tried again.

    Returns:
        What is measured, and whether that was interrupted before the last.

    Raises:
        TrialError: the base model could not be measured.
    """
    with Journal(directory / REPORT_JOURNAL) as journal:
        done = {r.request.number for r in journal.read() if r.is_complete}
        missing = [r for r in requests if r.number not in done]
        try:
            with closing(driver.run(iter(missing))) as results:
                for n_measured, result in enumerate(results, start=1):
                    journal.append(result)
                    progress.advance(n_measured, len(missing))
        except KeyboardInterrupt:
            return journal.read(), True  # a valid, smaller front
        return journal.read(), False


def finalized_members(directory: Path) -> tuple[Member, ...]:
    """Those of the front that the directory holds; none where that is damaged, or not yet there."""
    try:
        document = FrontDocument.read(directory)
    except RunDirectoryError:
        return ()
    return tuple(member for member in document.members if member.finalized)


def with_finalized(members: Sequence[Member], finalized: Sequence[Member]) -> list[Member]:
    """The members, with each finalized one in the place of what it was made of."""
    replaced = {member.finalized.searched_as for member in finalized if member.finalized}
    return [*(member for member in members if member.id not in replaced), *finalized]


def front_document(
    session: Session,
    record: StudyRecord,
    measured: Sequence[TrialResult],
    spent: Spent,
    *,
    searched: Mapping[str, float],
    finalized: Sequence[Member] = (),
) -> FrontDocument:
    """The front of what was measured on report tokens, and of what was finalized before.

    Args:
        session: of the run.
        record: of the run.
        measured: on report tokens.
        spent: by the search.
        searched: damage on search tokens by id, see `search_damages`.
        finalized: members of an earlier front of the run.

    Raises:
        TrialError: the base model is not among the measured.
    """
    by_name = {r.request.baseline_name: r for r in measured}
    if BASE_NAME not in by_name or not by_name[BASE_NAME].is_complete:
        raise _without_base(by_name.get(BASE_NAME))
    base = _metrics(by_name[BASE_NAME])
    if session.is_rotated:
        base = replace(base, resources=session.given_resources)
    members = measured_members(session.cost, measured, base.resources)
    candidates = with_finalized(members, finalized)
    return FrontDocument.of(
        study=_summary(session, record, spent, [*members, *finalized]),
        base=BaseEntry(base.storage_bytes, MemberQuality.of(base.quality), base.resources),
        baselines=[m for m in members if m.name],
        candidates=candidates,
        differences=paired(report_damages(measured, finalized)),
        objectives=session.settings.objectives,
        searched=searched,
    )


def report_damages(
    measured: Sequence[TrialResult], finalized: Sequence[Member]
) -> dict[str, tuple[float, ...]]:
    """Damage of each sequence of the report tokens by id, of models and of what was finalized."""
    found = {r.request.allocation.digest: r.damages for r in measured}
    return found | {m.id: m.finalized.report_damages for m in finalized if m.finalized}


def search_damages(
    results: Sequence[TrialResult], finalized: Sequence[Member] = ()
) -> dict[str, float]:
    """Damage on search tokens by id, of trials and of what was finalized."""
    found = {
        r.request.allocation.digest: _metrics(r).quality.damage.value
        for r in results
        if r.is_complete
    }
    rebuilt = {m.id: m.finalized.rebuilt_damage.value for m in finalized if m.finalized}
    return found | rebuilt


def measured_members(
    cost: CostModel, measured: Sequence[TrialResult], base: Resources
) -> list[Member]:
    """Everything that was measured but the base model, relative to its resources."""
    return [
        _member(r, base, cost)
        for r in measured
        if r.is_complete and r.request.baseline_name != BASE_NAME
    ]


def _without_base(failed: TrialResult | None) -> TrialError:
    how = f"failed: {failed.error} ({failed.status})." if failed else "did not finish."
    return TrialError(
        f"A front needs the base model measured on the report tokens, but that {how} Next step: "
        "the same command with --resume, which tries it again."
    )


def _member(result: TrialResult, base: Resources, cost: CostModel) -> Member:
    metrics = _metrics(result)
    request = result.request
    return Member(
        id=request.allocation.digest,
        bits_per_weight=cost.bits_per_weight(request.allocation),
        storage_bytes=metrics.storage_bytes,
        size_reduction=base[STORAGE].value / metrics.storage_bytes,
        quality=MemberQuality.of(metrics.quality),
        resources=metrics.resources,
        cost_efficiency=CostEfficiency().score(metrics.quality.retained, metrics.resources, base),
        allocation=request.allocation.to_json(),
        name=request.baseline_name or "",
        source=request.source,
    )


def _summary(
    session: Session,
    record: StudyRecord,
    spent: Spent,
    members: Sequence[Member],
) -> StudySummary:
    settings = session.settings
    splits = session.splits
    details: Mapping[str, Any] = {
        "data": settings.data,
        **session.task.details,
        "tokens": {
            "calibration": splits.calibration.n_tokens,
            "search": splits.search.n_tokens,
            "report": splits.report.n_tokens,
            "sequence_length": settings.sequence_length,
        },
        "search_dtype": record.resolved["forward"]["dtype"],
        "search_noise": record.resolved["forward"]["noise"],
        "report_dtype": record.resolved["report"]["dtype"],
        "driver": settings.driver,
        "workers": settings.workers,
        "device": settings.device,
        "device_profile": settings.device_profile,
        "rotation": settings.rotate,
        "model_digest": session.base.digest,
        "cost_efficiency": CostEfficiency().to_json(),
        "layer_bits": _layer_bits(session, members),
    }
    return StudySummary(
        model=settings.model,
        task=settings.task,
        space=settings.space,
        sampler=settings.sampler,
        seed=settings.seed,
        budget_spent=BudgetSpent(spent.trials, round(spent.seconds, 1), int(spent.tokens)),
        details=details,
    )


def _layer_bits(session: Session, members: Sequence[Member]) -> LayerBits:
    searched = set(session.space.searched_layers)
    layers = [layer for layer in session.base.layout.layers if layer.name in searched]
    return layer_bits(layers, members, footprint)


def _metrics(result: TrialResult) -> Metrics:
    assert result.metrics is not None  # callers pass complete trials
    return result.metrics
