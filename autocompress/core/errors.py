"""Errors that a user can act on.

Every message gives the rule, what was got, the nearest right answer and the next step. Each class
also inherits the builtin that callers would expect to catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class AutocompressError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_status: ClassVar[int] = 2


class UsageError(AutocompressError, ValueError):
    """An argument, option or combination of them is wrong."""


class UnknownNameError(UsageError):
    """A name is not in a registry."""


class SchemeError(UsageError):
    """A scheme is malformed or a layer cannot take it."""


class SpaceError(UsageError):
    """A search space file is malformed or does not fit the model."""


class BudgetError(UsageError):
    """A budget cannot be read or cannot be met."""


class DataError(UsageError):
    """Data is missing, empty, too short or of the wrong kind."""


class ModelError(UsageError):
    """A model cannot be loaded, or does not fit the task."""


class RunDirectoryError(AutocompressError, OSError):
    """A run directory is missing, not empty, read-only, full or damaged."""


class CheckpointError(AutocompressError, ValueError):
    """An exported checkpoint is damaged, truncated or from a newer version."""


class NoAnswerError(AutocompressError, LookupError):
    """The question was well-formed and the answer is no (nothing fits, nothing verified)."""

    exit_status: ClassVar[int] = 1


class TrialError(AutocompressError, RuntimeError):
    """A trial could not produce a finite measurement."""

    exit_status: ClassVar[int] = 1


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A clause naming what `name` may have meant: ``Did you mean 'x'? Available: ...``."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"{hint}Available: {shown or 'none'}."
