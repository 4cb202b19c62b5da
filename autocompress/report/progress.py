"""Progress on stderr: bars with time left on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_TENTH = 0.1


class TrialProgress(Protocol):
    """What `StudyProgress.trial` reads of `autocompress.search.study.Progress`."""

    @property
    def n_done(self) -> int:
        """Finished trials."""

    @property
    def n_early_stopped(self) -> int:
        """Those of them that were stopped early."""

    @property
    def n_failed(self) -> int:
        """Those of them that something went wrong with."""

    @property
    def fraction(self) -> float:
        """Share of the budget that is spent."""

    @property
    def remaining(self) -> str:
        """What is left of the budget."""

    @property
    def best(self) -> Sequence[object]:
        """Trials on the front so far."""


class StudyProgress:
    """Shows the steps and trials of a search, or the steps of an export; a context manager.

    On a terminal the current step has a spinner, and a bar with the time left once it counts;
    so have trials.
    Elsewhere (a pipe, a CI log) each step is one line and trials give a line for each tenth of
    the budget. Nothing is ever written to stdout.

    Args:
        enabled: False shows nothing (``--json``, Python callers).
        console: where to write; stderr by default.
    """

    def __init__(self, *, enabled: bool, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._enabled = enabled
        self._is_live = enabled and self._console.is_terminal
        self._steps = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._trials = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self._console,
            transient=True,
        )
        self._shown: Progress | None = None
        self._task: TaskID | None = None
        self._next_line = _TENTH
        self._is_searching = False
        self._text, self._started = "", 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def step(self, text: str) -> None:
        """Say that a long step starts; it replaces what was shown before."""
        if not self._is_live:
            self._line(text)
            return
        self._close()
        self._open(self._steps, text, total=None)

    def say(self, text: str) -> None:
        """Leave a line, between steps."""
        self._close()
        self._line(text)

    def advance(self, done: int, total: int) -> None:
        """Show how far the current step is; on a terminal only."""
        if not self._is_live or self._task is None:
            return
        if self._shown is self._steps:
            started, text = self._started, self._text
            self._take_down()
            self._open(self._trials, text, total=1.0)
            self._started = started
        note = f"{done} of {total}"
        self._trials.update(self._task, completed=done / total, note=note, refresh=True)

    def trial(self, progress: TrialProgress) -> None:
        """Show where the study stands after a trial."""
        counts = ((progress.n_early_stopped, "stopped early"), (progress.n_failed, "failed"))
        beside = ", ".join(f"{count} {what}" for count, what in counts if count)
        note = f"{progress.n_done} trial{'s' * (progress.n_done != 1)}"
        note += f" ({beside})" if beside else ""
        note += f", {len(progress.best)} on the front"
        if progress.remaining:
            note += f", {progress.remaining} left"
        if not self._is_live:
            self._tenth(progress.fraction, note)
            return
        if not self._is_searching:
            self._close()
            self._open(self._trials, "Searching", total=1.0)
            self._is_searching = True
        if self._task is not None:
            self._trials.update(self._task, completed=min(progress.fraction, 1.0), note=note)

    def _tenth(self, fraction: float, note: str) -> None:
        if fraction < self._next_line:
            return
        self._next_line = (int(fraction / _TENTH + 1e-9) + 1) * _TENTH
        self._line(f"{min(fraction, 1.0):4.0%}  {note}")

    def _line(self, text: str) -> None:
        if self._enabled:
            self._console.print(Text(text), soft_wrap=True)

    def _open(self, shown: Progress, text: str, total: float | None) -> None:
        self._shown, self._text, self._started = shown, text, time.monotonic()
        self._task = shown.add_task(text.replace("[", r"\["), total=total, note="")
        shown.start()

    def _take_down(self) -> None:
        if self._shown is not None and self._task is not None:
            self._shown.remove_task(self._task)
            self._shown.stop()
        self._shown, self._task, self._is_searching = None, None, False

    def _close(self) -> None:
        """Take down what is shown; a finished step leaves its line, so that a log remains."""
        if self._task is not None:
            self._take_down()
            self._line(f"{self._text} ({time.monotonic() - self._started:.0f} s)")
