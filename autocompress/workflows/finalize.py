"""Rebuild a picked member with more care, and keep the result only if it is better.

The member keeps its bytes. Each layer is compressed again by the strongest method that stores as
much, with statistics gathered block by block on the compressed prefix; on request scales and
rounding of each block are then tuned together (`models/block_tuning.py`). Old and new are compared
on the search tokens, sequence by sequence. The report tokens measure what is kept; they decide only
that a rebuilt member which another one beats there is not put on the front.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocompress.bank import Bank
from autocompress.core import (
    Allocation,
    Metrics,
    TrialRequest,
    TrialResult,
    digest,
)
from autocompress.core.errors import NoAnswerError, TrialError, UsageError
from autocompress.fronts import (
    Finalized,
    FrontDocument,
    Member,
    MemberQuality,
    find_member,
    paired,
    paired_difference,
)
from autocompress.methods import footprint
from autocompress.objectives import CostEfficiency
from autocompress.report.layers import layer_bits
from autocompress.search import TrialContext
from autocompress.search.journal import JOURNAL_FILE, read_journal
from autocompress.search.run_trial import run_trial
from autocompress.workflows.contexts import report_context, search_context
from autocompress.workflows.export import require_same_inputs
from autocompress.workflows.publish import (
    REPORT_JOURNAL,
    measured_members,
    report_damages,
    search_damages,
    with_finalized,
)
from autocompress.workflows.rebuild import (
    BLOCK_STEPS,
    Recipe,
    rebuilt_bank,
    rebuilt_digest,
    statistics_name,
    strongest_allocation,
)
from autocompress.workflows.report import write_report
from autocompress.workflows.session import QUIET, Progress, Session, open_session
from autocompress.workflows.settings import StudyRecord, cache_directory

MOST_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class Finalization:
    """What came of it.

    Attributes:
        member: what the front holds now: the rebuilt member, or the old one.
        replaced: True if the rebuilt member took the old one's place.
        finalized: what was rebuilt, and both damages on search tokens.
        reason: why the old member stayed; empty if it was replaced.
    """

    member: Member
    replaced: bool
    finalized: Finalized
    reason: str = ""

    @property
    def summary(self) -> str:
        """Two lines for people."""
        one, two = self.finalized.search_damage, self.finalized.rebuilt_damage
        difference = self.finalized.difference
        verdict = (
            f"replaced by {self.member.id[:8]}: retained quality "
            f"{self.member.quality.retained:.4f} on report tokens"
            if self.replaced
            else f"the member stays as it was: {self.reason}"
        )
        return (
            f"damage on search tokens {one.value:.4g} -> {two.value:.4g} (per sequence "
            f"{difference.value:+.3g} ± {difference.standard_error:.2g}, paired)\n{verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "member": self.member.to_json(),
            "replaced": self.replaced,
            "reason": self.reason,
            "finalized": self.finalized.to_json(),
        }


def finalize_member(
    directory: Path,
    member_id: str,
    *,
    block_steps: int = BLOCK_STEPS,
    progress: Progress = QUIET,
) -> Finalization:
    """Rebuild a member of a run's front; replace it in `front.json` if that is better.

    A search that is resumed afterwards keeps the rebuilt member, unless a new one beats it.

    Args:
        directory: run directory.
        member_id: id, unambiguous start of an id, or name of a baseline on the front.
        block_steps: of gradient descent on scales and rounding of each block as a whole, after its
            layers were compressed; 0 for none.
        progress: told when a long step starts.

    Raises:
        RunDirectoryError: no run, or it cannot be written.
        UnknownNameError: no such member.
        UsageError: it is finalized already, or model or device profile are not those of the run.
        NoAnswerError: it is not on the front, or compresses nothing but embeddings.
        TrialError: the rebuilt model cannot be measured.
    """
    if not 0 <= block_steps <= MOST_STEPS:
        raise UsageError(
            f"Block steps must be 0 to {MOST_STEPS:,}, but got {block_steps}. "
            f"The nearest legal value is {min(max(block_steps, 0), MOST_STEPS)}."
        )
    document = FrontDocument.read(directory)
    _ = _member_to_rebuild(document, member_id)  # before the model is loaded
    record = StudyRecord.read(directory)
    session = open_session(record.settings, cache_directory(record.settings, directory), progress)
    require_same_inputs(session, record)
    _require_same_device(session, record)
    return finalize_in(session, record, directory, document, member_id, block_steps=block_steps)


def _require_same_device(session: Session, record: StudyRecord) -> None:
    """Refuse to put a member on a front whose costs are those of another device."""
    now = session.cost.profile.digest
    if record.resolved.get("device_digest", now) != now:  # runs of version 0.1 do not say it
        raise UsageError(
            f"A member is finalized with the costs of its search, but the device profile "
            f"{session.settings.device_profile} is another one now. Next step: restore it, or "
            "search into a new --out directory."
        )


def finalize_in(
    session: Session,
    record: StudyRecord,
    directory: Path,
    document: FrontDocument,
    member_id: str,
    *,
    block_steps: int = BLOCK_STEPS,
) -> Finalization:
    """`finalize_member` of the run that `session` and `record` are of."""
    member = _member_to_rebuild(document, member_id)
    case = _Case(directory, document, member, session, record, block_steps)
    pair = _rebuild(case)
    finalized = _compare(case, pair)
    if not finalized.rebuilt_damage.value < finalized.search_damage.value:
        return Finalization(member, False, finalized, "rebuilding did not lower the damage.")
    return _replace(case, pair, finalized)


@dataclass(frozen=True, slots=True)
class _Case:
    """What is rebuilt, and where."""

    directory: Path
    document: FrontDocument
    member: Member
    session: Session
    record: StudyRecord
    block_steps: int


@dataclass(frozen=True, slots=True)
class _Pair:
    """A member as the search had it and as it was rebuilt: allocations and where they lie."""

    searched: Allocation
    rebuilt: Allocation
    searched_bank: Bank
    rebuilt_bank: Bank
    statistics: str


def _member_to_rebuild(document: FrontDocument, member_id: str) -> Member:
    named = find_member(document, member_id)
    member = next((m for m in document.members if m.id == named.id), None)
    if member is None:
        raise NoAnswerError(
            f"{named.name or named.id} is a baseline that a member of the front beats, and only "
            "members are finalized. Next step: `autocompress front DIR` lists them."
        )
    if member.finalized is not None:
        raise UsageError(
            f"Member {member.id[:8]} is finalized already (it was "
            f"{member.finalized.searched_as[:8]}). Next step: export it, or finalize another one."
        )
    return member


def _rebuild(case: _Case) -> _Pair:
    session, member = case.session, case.member
    layout = session.base.layout
    searched = Allocation.from_json(member.allocation)
    if all(layout.layer(name).kind == "embedding" for name in searched):
        raise NoAnswerError(
            f"Member {member.id[:8]} compresses no layer of a block or head, so there is nothing "
            "to rebuild. Next step: pick another member, or export it as it is."
        )
    dtype = case.record.resolved["forward"]["dtype"]
    base = session.bank(dtype)
    rebuilt = strongest_allocation(layout, searched)
    name = statistics_name(session, base, searched, case.block_steps)
    bank = rebuilt_bank(session, base, dtype, Recipe(rebuilt, name, case.block_steps))
    return _Pair(searched, rebuilt, base, bank, name)


def _compare(case: _Case, pair: _Pair) -> Finalized:
    """Both on the search tokens."""
    session = case.session
    session.progress.step("Comparing on search tokens")
    context = search_context(session, case.record)
    old = _measured(context, pair.searched, pair.searched_bank)
    new = _measured(context, pair.rebuilt, pair.rebuilt_bank)
    return Finalized(
        searched_as=case.member.id,
        statistics=pair.statistics,
        statistics_digest=rebuilt_digest(session, pair.rebuilt_bank, pair.statistics),
        block_steps=case.block_steps,
        changed={
            name: str(scheme)
            for name, scheme in pair.searched.items()
            if pair.rebuilt[name] != scheme
        },
        search_damage=_metrics(old).quality.damage,
        rebuilt_damage=_metrics(new).quality.damage,
        difference=paired_difference(new.damages, old.damages),
    )


def _measured(context: TrialContext, allocation: Allocation, bank: Bank) -> TrialResult:
    request = TrialRequest(0, allocation, "finalize")
    result = run_trial(request, context=replace(context, bank=bank))
    if not result.is_complete:
        raise TrialError(
            f"A member must be measurable to be finalized, but that failed: {result.error} The "
            "front is as it was. Next step: pick another member."
        )
    return result


def _replace(case: _Case, pair: _Pair, finalized: Finalized) -> Finalization:
    """Measure the rebuilt member on the report tokens and write the new front."""
    directory, document, member, session = case.directory, case.document, case.member, case.session
    session.progress.step("Measuring on report tokens")
    result = _measured(report_context(session, case.record), pair.rebuilt, pair.rebuilt_bank)
    finalized = replace(finalized, report_damages=result.damages)
    rebuilt = _rebuilt_member(document, member, _metrics(result), pair, finalized)
    measured = read_journal(directory / REPORT_JOURNAL).results
    off_front = measured_members(session.cost, measured, document.base.resources)
    earlier = [m for m in document.members if m.finalized]
    candidates = with_finalized([*document.members, *off_front], [rebuilt, *earlier])
    changed = FrontDocument.of(
        study=document.study,
        base=document.base,
        baselines=document.baselines,
        candidates=candidates,
        reference_point=document.reference_point,
        differences=paired(report_damages(measured, candidates)),
        objectives=document.objectives,
        searched=search_damages(read_journal(directory / JOURNAL_FILE).results, candidates),
    )
    kept = next((m for m in changed.members if m.id == rebuilt.id), None)
    if kept is None:
        reason = (
            f"on report tokens another member takes no more {document.objectives.words} and "
            "retains more."
        )
        return Finalization(member, False, finalized, reason)
    _with_layer_bits(changed, session).write(directory)
    write_report(directory)
    return Finalization(kept, True, finalized)


def _rebuilt_member(
    document: FrontDocument, member: Member, metrics: Metrics, pair: _Pair, finalized: Finalized
) -> Member:
    quality, resources = metrics.quality, metrics.resources
    return replace(
        member,
        id=digest([pair.rebuilt.to_json(), finalized.statistics_digest]),
        quality=MemberQuality.of(quality),
        resources=resources,
        cost_efficiency=CostEfficiency().score(
            quality.retained, resources, document.base.resources
        ),
        allocation=pair.rebuilt.to_json(),
        name="",  # a baseline stays what the search is compared with
        finalized=finalized,
    )


def _with_layer_bits(document: FrontDocument, session: Session) -> FrontDocument:
    """The document with the bits of schemes that are new to it, for the heat map."""
    searched = set(session.space.searched_layers)
    layers = [layer for layer in session.base.layout.layers if layer.name in searched]
    shown = {m.id: m for m in (*document.baselines, *document.members)}
    bits = layer_bits(layers, list(shown.values()), footprint)
    details = {**document.study.details, "layer_bits": bits}
    return replace(document, study=replace(document.study, details=details))


def _metrics(result: TrialResult) -> Metrics:
    assert result.metrics is not None  # callers pass complete trials
    return result.metrics
