"""Running out of memory: how to tell it, and what to tell the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autocompress.core.errors import UsageError

_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's error, torch's, and those of backends that have words alone for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
    )


@contextmanager
def enough_memory(device: str, need: str) -> Iterator[None]:
    """Work that may be too large for a device.

    Args:
        device: where the model is.
        need: what the work takes, as the beginning of a sentence.

    Raises:
        UsageError: its memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        elsewhere = "a machine" if torch.device(device).type == "cpu" else "--device cpu, or a GPU"
        said = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise UsageError(
            f"{need}, but the memory of {device} ran out: {said} Next step: a shorter "
            f"--sequence-length, or {elsewhere} with more memory."
        ) from error
