"""The journal: one line of JSON per finished trial, append-only, the truth about a study.

A trial that failed and is tried again has a line for each try; the last one counts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Self

from autocompress.core import TrialResult
from autocompress.core.errors import AutocompressError, RunDirectoryError

_log = logging.getLogger(__name__)

JOURNAL_FILE = "trials.jsonl"
"""Name of a study's journal in its run directory."""


@dataclass(frozen=True, slots=True)
class JournalContents:
    """What a journal file holds.

    Attributes:
        results: finished trials in the order in which they finished; of one that failed and was
            tried again, the last try.
        intact_bytes: length of the part that holds them.
        torn: bytes after the last newline: a line whose writing was cut off.
    """

    results: tuple[TrialResult, ...]
    intact_bytes: int
    torn: bytes


def read_journal(path: Path) -> JournalContents:
    """Read a journal without changing it; a missing file is an empty journal.

    Raises:
        RunDirectoryError: a line that was written completely is damaged, or a number occurs again
            that had not failed.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise RunDirectoryError(f"The journal {path} cannot be read: {error}.") from error
    intact, newline, torn = data.rpartition(b"\n")
    lines = intact.split(b"\n") if newline else []
    results: dict[int, TrialResult] = {}
    for line_number, line in enumerate(lines, start=1):
        result = _read_line(path, line_number, line)
        number = result.request.number
        earlier = results.pop(number, None)
        if earlier is not None and not earlier.has_failed:
            raise _damaged(path, line_number, f"trial {number} is there for the second time")
        results[number] = result
    return JournalContents(tuple(results.values()), len(intact) + len(newline), torn)


def _read_line(path: Path, line_number: int, line: bytes) -> TrialResult:
    try:
        return TrialResult.from_json(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, AutocompressError) as error:
        raise _damaged(path, line_number, f"{type(error).__name__}: {error}") from error


def _damaged(path: Path, line_number: int, what: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"The journal {path} is damaged at line {line_number}: {what}. Nothing was changed. "
        "Next step: restore the line from a backup, or move it out of the file by hand; that "
        "trial is then run again."
    )


def _open_for_append(path: Path) -> RawIOBase:
    return path.open("ab", buffering=0)


class Journal:
    """The one writer of a journal file; a context manager that holds the directory's lock.

    A last line that was cut off by a crash is moved to a side file, with a warning; its trial
    counts as not run.

    Args:
        path: the file, ``<run>/trials.jsonl``; created with its directory.
        opener: opens the file for unbuffered appending.

    Raises:
        RunDirectoryError: another process writes this journal, it is damaged, or its directory
            cannot be written.
    """

    def __init__(
        self, path: Path, *, opener: Callable[[Path], RawIOBase] = _open_for_append
    ) -> None:
        self.path = path
        self._lock = _acquire_lock(path)
        try:
            contents = read_journal(path)
            if contents.torn:
                _set_aside(path, contents)
            self._file = opener(path)
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, OSError) and not isinstance(error, RunDirectoryError):
                raise _cannot_write(path, error) from error
            raise
        self._length = contents.intact_bytes
        self._results = {result.request.number: result for result in contents.results}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and the lock."""
        self._file.close()
        os.close(self._lock)

    def read(self) -> list[TrialResult]:
        """Finished trials as `JournalContents.results`."""
        return list(self._results.values())

    def append(self, result: TrialResult) -> None:
        """Write one line and wait until it is on the disk.

        Raises:
            RunDirectoryError: it could not be written; the lines before it are intact.
        """
        line = json.dumps(result.to_json(), separators=(",", ":")).encode() + b"\n"
        try:
            self._write(line)
        except OSError as error:
            self._undo()
            raise _cannot_write(self.path, error, n_intact=len(self._results)) from error
        self._length += len(line)
        self._results.pop(result.request.number, None)
        self._results[result.request.number] = result

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            written = self._file.write(rest) or 0
            rest = rest[written:]
        os.fsync(self._file.fileno())

    def _undo(self) -> None:
        """Take back a part of a line; if even that fails, the next reader sets it aside."""
        try:
            self._file.truncate(self._length)
        except OSError as error:
            _log.warning("The journal %s may end in a torn line: %s", self.path, error)


def _acquire_lock(path: Path) -> int:
    """A file descriptor that holds the lock; the system frees it when the process ends."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
        os.close(descriptor)
        raise RunDirectoryError(
            f"One search at a time may write {path.parent}, but the process {owner} is writing "
            "it now. Next step: wait for it, or give another --out directory."
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _set_aside(path: Path, contents: JournalContents) -> None:
    index = 1
    while (side := path.with_name(f"{path.name}.torn-{index}")).exists():
        index += 1
    side.write_bytes(contents.torn)
    os.truncate(path, contents.intact_bytes)
    _log.warning(
        "The last line of %s was cut off after %d bytes, as by a crash; it is kept in %s and its "
        "trial is run again.",
        path,
        len(contents.torn),
        side.name,
    )


def _cannot_write(path: Path, error: OSError, n_intact: int | None = None) -> RunDirectoryError:
    kept = "" if n_intact is None else f" The {n_intact} trials before it are intact."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunDirectoryError(
            f"No space is left for the journal {path}.{kept} Next step: free space on that disk, "
            "then repeat the command with --resume."
        )
    return RunDirectoryError(
        f"The journal {path} cannot be written: {error.strerror or error}.{kept} Next step: make "
        f"the directory writable, or give another --out directory."
    )
