"""From a member of a front to a checkpoint that a fresh process has verified."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.bank import Bank
from autocompress.core import Allocation
from autocompress.core.errors import NoAnswerError, UsageError
from autocompress.core.nullable import or_null
from autocompress.export import Manifest, run_fresh_process
from autocompress.export.directory import require_free
from autocompress.export.exporter import Exporter, require, require_model, require_packages
from autocompress.export.formats import EXPORTERS
from autocompress.fronts.document import FrontDocument, Member, find_member
from autocompress.workflows.rebuild import Recipe, rebuilt_bank, rebuilt_digest
from autocompress.workflows.session import (
    QUIET,
    Progress,
    Session,
    open_session,
)
from autocompress.workflows.settings import StudyRecord, cache_directory
from autocompress.workflows.tasks import require_same_details

_log = logging.getLogger(__name__)

_CLAIMED = ("storage_bytes", "quality", "cost_efficiency", "resources")
"""What a manifest claims of a member, as `front.json` has it."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Claim against reload.

    Attributes:
        rows: by check: what was claimed, what the reload gave, whether they agree.
    """

    rows: tuple[tuple[str, float, float, bool], ...]

    @property
    def passed(self) -> bool:
        """True if every check agrees."""
        return all(agrees for *_, agrees in self.rows)

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest; numbers that are not finite become null."""
        return {
            "passed": self.passed,
            "checks": [
                {
                    "name": name,
                    "claimed": or_null(claimed),
                    "reloaded": or_null(reloaded),
                    "passed": agrees,
                }
                for name, claimed, reloaded, agrees in self.rows
            ],
        }


@dataclass(frozen=True, slots=True)
class Written:
    """An export: where it lies and how its verification went (None if it was not asked for)."""

    path: Path
    verification: Verification | None


def export_member(
    directory: Path,
    member_id: str,
    out: Path,
    *,
    checkpoint_format: str = "packed",
    verify: bool = True,
    progress: Progress = QUIET,
) -> Written:
    """Rebuild a member from the layer bank and write it as a checkpoint.

    Code that ships with the model runs if the search of the run was allowed to run it.

    Args:
        directory: run directory.
        member_id: id, unambiguous start of an id, or name of a baseline.
        out: directory to write; must not exist or be empty.
        checkpoint_format: name of an export format, e.g. ``packed`` (bit-packed, as small as
            claimed) or ``dense`` (decoded weights in the base dtype).
        verify: reload in a fresh process and measure again on the report tokens.
        progress: told when a long step starts.

    Raises:
        UsageError: there is no such format, its packages are not installed, or it cannot hold the
            model or a layer of the member; nothing is written then.
        NoAnswerError: the reload does not reproduce the claim; the export is left in place and
            its manifest says so.
    """
    exporter = EXPORTERS[checkpoint_format]
    require_packages(exporter)
    require_free(out)
    member = find_member(FrontDocument.read(directory), member_id)
    record = StudyRecord.read(directory)
    session = open_session(record.settings, cache_directory(record.settings, directory), progress)
    require_same_inputs(session, record)
    require_model(exporter, session.base)
    require(exporter, session.base.layout, Allocation.from_json(member.allocation))
    _write(session, record, member, out, exporter)
    if not verify:
        return Written(out, None)
    trust = record.settings.trust_remote_code
    verification = verify_export(member, out, exporter, progress, trust_remote_code=trust)
    Manifest.read(out).with_verification(verification.to_json()).write(out)
    if not verification.passed:
        failed = ", ".join(name for name, *_, agrees in verification.rows if not agrees)
        raise NoAnswerError(
            f"The reload of {out} does not reproduce the claim ({failed}). The manifest holds "
            "both numbers. Next step: search and export again on one machine."
        )
    return Written(out, verification)


def _write(
    session: Session, record: StudyRecord, member: Member, out: Path, exporter: Exporter
) -> None:
    allocation = Allocation.from_json(member.allocation)
    bank = _bank_of(session, record, member)
    session.progress.step(f"Packing {len(allocation)} layers")
    weights = {name: bank.packed(name, scheme) for name, scheme in allocation.items()}
    published = member.to_json()
    claim = {
        "member": member.id,
        "base_model": session.settings.model,
        **{name: published[name] for name in _CLAIMED},
        "measured": measured_on(session, record),
    }
    exporter.write(session.base, weights, out, claim=claim)


def _bank_of(session: Session, record: StudyRecord, member: Member) -> Bank:
    """The bank that holds, or builds again, the very tensors that the member was measured with."""
    dtype = record.resolved["forward"]["dtype"]
    base, finalized = session.bank(dtype), member.finalized
    if finalized is None:
        return base
    allocation = Allocation.from_json(member.allocation)
    recipe = Recipe(allocation, finalized.statistics, finalized.block_steps)
    bank = rebuilt_bank(session, base, dtype, recipe)
    found = rebuilt_digest(session, bank, finalized.statistics)
    if found != finalized.statistics_digest:
        _log.warning(
            "The statistics that %s was rebuilt with were gathered again and differ from those it "
            "was measured with, as another machine or version computes them; the export is "
            "verified against its claim.",
            member.id[:8],
        )
    return bank


def measured_on(session: Session, record: StudyRecord) -> Mapping[str, Any]:
    """How the published quality was measured, in enough detail to measure it again."""
    split = session.splits.report
    return {
        "settings": session.settings.to_json(),
        "split": split.name,
        "split_digest": split.digest,
        "n_tokens": split.n_tokens,
        **session.task.details,
        **record.resolved["report"],
    }


def verify_export(
    member: Member,
    out: Path,
    exporter: Exporter,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> Verification:
    """Load in a fresh process, measure on the report tokens, compare with the claim.

    The bytes are compared with those that the search claimed where the format is as small as that,
    else with those of the manifest.
    """
    progress.step("Reloading in a fresh process and measuring again")
    request = {"checkpoint": str(out), "trust_remote_code": trust_remote_code}
    answer = run_fresh_process("autocompress.workflows.remeasure", request)
    retained = float(answer["quality"]["retained"])
    claimed = member.quality.retained
    stored, written = int(answer["storage_bytes"]), Manifest.read(out).storage_bytes
    expected = member.storage_bytes if exporter.claims_bytes else written
    rows = (
        ("retained", claimed, retained, abs(claimed - retained) <= exporter.tolerance),
        ("storage_bytes", expected, stored, stored == expected),
    )
    return Verification(rows)


def require_same_inputs(session: Session, record: StudyRecord) -> None:
    """Refuse to go on with a run whose base model, its pooling, or the data is another now.

    Other data means other statistics to compress with, and report tokens that the rest of the
    front was not measured on.

    Raises:
        UsageError: what differs.
    """
    settings = session.settings
    sources = {
        "model_digest": ("weights", settings.model),
        "splits_digest": ("data", settings.data),
    }
    now = {"model_digest": session.base.digest, "splits_digest": session.splits.digest}
    for name, (what, source) in sources.items():
        then = record.resolved[name]
        if now[name] != then:
            raise UsageError(
                f"The run was made with other {what} than {source} now holds ({then[:12]} then, "
                f"{now[name][:12]} now). Next step: restore the {what}, or search again."
            )
    require_same_details(session.task, record.resolved, settings.model)
