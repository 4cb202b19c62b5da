"""Locks between the processes of a node, which the system releases when their holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, made if there is none, against other threads and processes.

    A directory that is read-only or cannot lock (some network file systems) is no reason to stop:
    the lock then counts as held by everyone, and the worst is work that is done twice.

    Args:
        path: the file; it stays, empty, so that nobody locks a file that another one removed.
        wait: for the holder to let go.

    Yields:
        False only if somebody else holds it and `wait` is False.
    """
    try:
        descriptor = _acquired(path, wait)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        if descriptor is not None:
            _release(descriptor)


def _acquired(path: Path, wait: bool) -> int | None:
    """A locked descriptor; None where files cannot be locked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _release(descriptor: int) -> None:
    with suppress(OSError):  # explicit: a forked child may still have the descriptor open
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
