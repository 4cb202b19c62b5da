"""What `--aim` says: values of the main resource at which the best model is wanted most."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from autocompress.core import LATENCY, STORAGE, Objectives, short_name
from autocompress.core.errors import UsageError
from autocompress.fronts import parse_bytes

_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_TIME = re.compile(r"\s*([\d.]+(?:e[+-]?\d{1,3})?)\s*(us|ms|s)\s*", re.IGNORECASE)


def parse_aims(texts: Sequence[str], objectives: Objectives) -> tuple[float, ...]:
    """Aims in the unit of the first resource that is optimized: bytes or milliseconds per token.

    Raises:
        UsageError: one is no value of that resource, or the resource takes no aims.
    """
    if not texts:
        return ()
    if objectives.main == STORAGE:
        return tuple(map(_parse_size, texts))
    if objectives.main == LATENCY:
        return tuple(map(parse_milliseconds, texts))
    raise UsageError(
        f"An aim is a size or a time per token, but --optimize {objectives.text} is about "
        f"{short_name(objectives.main)} first. Next step: leave --aim away, or name bytes or "
        "latency before the other resources."
    )


def _parse_size(text: str) -> float:
    if _TIME.fullmatch(text):
        raise UsageError(
            "Where bytes are the first resource of --optimize, an aim is a size, but got the time "
            f"{text!r}. Next step: add --optimize quality,latency, or give a size such as 60MB."
        )
    return float(parse_bytes(text))


def parse_milliseconds(text: str) -> float:
    """Read a time such as ``3ms``, ``800us`` or ``0.01 s``.

    Raises:
        UsageError: the text is no time above 0.
    """
    match = _TIME.fullmatch(text)
    try:
        time = float(match[1]) * _MILLISECONDS[match[2].lower()] if match else math.nan
    except ValueError:
        time = math.nan
    if not (math.isfinite(time) and time > 0):
        raise UsageError(
            "Where latency is the first resource of --optimize, an aim is a time per token above "
            f"0 with the unit us, ms or s, but got {text!r}. Example: 3ms."
        )
    return time
