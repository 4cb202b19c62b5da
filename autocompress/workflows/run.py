"""A finished (or stopped) search as an object: its front, its members, their exports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.fronts.document import FrontDocument, Member, find_member, parse_bytes
from autocompress.fronts.document import pick as pick_member

if TYPE_CHECKING:
    from autocompress.workflows.finalize import Finalization


@dataclass(frozen=True, slots=True)
class RunMember:
    """One compressed model of a front.

    Attributes:
        directory: the run that it belongs to.
        entry: its record in `front.json`: bytes, quality, resources, allocation.
    """

    directory: Path
    entry: Member

    @property
    def id(self) -> str:
        """Name of the member within its run."""
        return self.entry.id

    def export(
        self,
        out: str | Path,
        *,
        checkpoint_format: str = "packed",
        verify: bool = True,
    ) -> Path:
        """Write the member as a checkpoint and reload it in a fresh process.

        Args:
            out: directory to write; must not exist or be empty.
            checkpoint_format: ``packed``, ``dense``, ``compressed-tensors``, … as for
                ``autocompress export --format``.
            verify: reload and measure again.

        Returns:
            The directory that was written.

        Raises:
            UsageError: the format is unknown or cannot hold the member.
            NoAnswerError: the reloaded checkpoint does not reproduce the claimed bytes or quality.
            RunDirectoryError: `out` is not empty or cannot be written.
        """
        from autocompress.workflows.export import export_member

        return export_member(
            self.directory, self.id, Path(out), checkpoint_format=checkpoint_format, verify=verify
        ).path

    def finalize(self) -> Finalization:
        """Rebuild the member with more care; `front.json` holds the result if it is better.

        Raises:
            NoAnswerError: the member is not on the front, or there is nothing to rebuild.
            UsageError: it is finalized already.
        """
        from autocompress.workflows.finalize import finalize_member

        return finalize_member(self.directory, self.id)


@dataclass(frozen=True, slots=True)
class RunFront:
    """The published front of a run; iterates over its members, least of the main resource first."""

    directory: Path
    document: FrontDocument

    def __iter__(self) -> Iterator[RunMember]:
        return (RunMember(self.directory, member) for member in self.document.members)

    def __len__(self) -> int:
        return len(self.document.members)

    def __getitem__(self, member: str | int) -> RunMember:
        """The member (or baseline) of that id or unambiguous start of an id; or by its place."""
        if isinstance(member, int):
            return RunMember(self.directory, self.document.members[member])
        return RunMember(self.directory, find_member(self.document, member))

    def pick(
        self,
        *,
        by: str = "cost-efficiency",
        min_quality: float | None = None,
        max_bytes: int | str | None = None,
        max_latency_ms: float | None = None,
    ) -> RunMember:
        """The best member under constraints.

        Raises:
            UsageError: `by` is unknown, `max_bytes` is no size, or `min_quality` is in percent.
            NoAnswerError: no member fits.
        """
        limit = parse_bytes(max_bytes) if isinstance(max_bytes, str) else max_bytes
        entry = pick_member(
            self.document,
            by=by,
            min_quality=min_quality,
            max_bytes=limit,
            max_latency_ms=max_latency_ms,
        )
        return RunMember(self.directory, entry)


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory: study, journal, front and report."""

    directory: Path
    document: FrontDocument

    @property
    def front(self) -> RunFront:
        """The members that no other measured model beats on quality and all optimized resources."""
        return RunFront(self.directory, self.document)

    @property
    def report(self) -> Path:
        """The self-contained HTML report."""
        return self.directory / "report.html"


def load_run(directory: str | Path) -> Run:
    """Open the run directory of an earlier search.

    Raises:
        RunDirectoryError: there is no front, or it is damaged.
    """
    path = Path(directory)
    return Run(path, FrontDocument.read(path))
