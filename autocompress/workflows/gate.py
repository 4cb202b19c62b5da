"""Judge a run's picked member, or an export, against thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocompress.core.errors import (
    CheckpointError,
    NoAnswerError,
    RunDirectoryError,
    UsageError,
)
from autocompress.fronts import parse_bytes
from autocompress.fronts.document import FRONT_FILE, FrontDocument, Member, pick
from autocompress.objectives import Candidate, Check, judge


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a gate decided.

    Attributes:
        candidate: what was judged.
        checks: one per threshold.
    """

    candidate: Candidate
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """One JSON document for machines."""
        return {
            "passed": self.passed,
            "candidate": self.candidate.to_json(),
            "checks": [check.to_json() for check in self.checks],
        }


def judge_target(
    target: str | Path,
    *,
    min_quality: float | None = None,
    max_bytes: int | str | None = None,
    min_cost_efficiency: float | None = None,
    max_latency_ms: float | None = None,
) -> Verdict:
    """Judge a run directory or an export.

    Of a run, the member is judged that `pick` takes under the same quality, size and latency
    thresholds; if none fits, the one of best cost efficiency (or best quality, if all are below its
    floor), so that the table shows what fails.
    An export is judged by the bytes that its files hold now and the quality that its reload
    verified. Cost efficiency and latency are those of the packed format: of an export in another
    one they are not known.

    Args:
        target: the directory.
        min_quality: least retained quality.
        max_bytes: most bytes, as a number or as in ``60MB``.
        min_cost_efficiency: least cost efficiency.
        max_latency_ms: most milliseconds per token.

    Raises:
        UsageError: no threshold was given, one cannot be read, or the quality is in percent.
        RunDirectoryError: the directory is neither a run nor an export.
        CheckpointError: the export is damaged, or its reload did not verify it.
    """
    max_bytes = parse_bytes(max_bytes) if isinstance(max_bytes, str) else max_bytes
    thresholds = (min_quality, max_bytes, min_cost_efficiency, max_latency_ms)
    if all(value is None for value in thresholds):
        raise UsageError(
            "A gate needs a threshold, but none was given. Next step: add --min-quality 0.97, "
            "--max-bytes 60MB, --min-cost-efficiency 2.0 or --max-latency-ms 5."
        )
    path = Path(target)
    if (path / FRONT_FILE).is_file():
        member = _picked(FrontDocument.read(path), min_quality, max_bytes, max_latency_ms)
        candidate = Candidate.of_member(member)
    else:
        candidate = _exported(path)
    checks = judge(
        candidate,
        min_quality=min_quality,
        max_bytes=max_bytes,
        min_cost_efficiency=min_cost_efficiency,
        max_latency_ms=max_latency_ms,
    )
    return Verdict(candidate, tuple(checks))


def _picked(
    document: FrontDocument,
    min_quality: float | None,
    max_bytes: int | None,
    max_latency_ms: float | None,
) -> Member:
    try:
        return pick(
            document, min_quality=min_quality, max_bytes=max_bytes, max_latency_ms=max_latency_ms
        )
    except NoAnswerError:
        pass
    try:
        return pick(document)
    except NoAnswerError:  # nothing reaches the floor of the cost efficiency
        return pick(document, by="quality")


def _exported(path: Path) -> Candidate:
    # The manifest reader pulls in no torch; sizes come from the files' headers.
    from autocompress.export.formats import EXPORTERS
    from autocompress.export.manifest import Manifest, is_export

    if not is_export(path):
        raise RunDirectoryError(
            f"A gate judges a run directory (with {FRONT_FILE}) or an export, but {path} is "
            "neither. Next step: give the --out directory of `autocompress search` or `export`."
        )
    manifest = Manifest.read(path)
    exporter = EXPORTERS[manifest.checkpoint_format]
    candidate = Candidate.of_claim(manifest.claim, storage_bytes=exporter.stored_bytes(path))
    candidate = replace(candidate, retained=_verified(path, manifest.verification))
    if exporter.claims_bytes:
        return candidate
    return replace(candidate, cost_efficiency=math.nan, latency_ms_per_token=math.nan)


def _verified(path: Path, verification: Mapping[str, Any] | None) -> float:
    """The retained quality that a reload in a fresh process gave."""
    if verification is None or verification.get("passed") is not True:
        how = "was not verified" if verification is None else "failed its verification"
        raise CheckpointError(
            f"A gate judges what a reload of the export verified, but {path} {how}. Next step: "
            "export the member again, with verification, and look at what it says."
        )
    for check in verification.get("checks", ()):
        if check.get("name") == "retained" and check.get("reloaded") is not None:
            return float(check["reloaded"])
    return math.nan
