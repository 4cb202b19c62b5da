"""Numbers as people read them."""

from __future__ import annotations

import math

from autocompress.core import LATENCY, STORAGE, short_name

_UNKNOWN = "–"


def size(n_bytes: float) -> str:
    """Decimal megabytes or the unit that fits, three significant digits: ``8.07 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor * 0.9995:
            return f"{significant(n_bytes / factor)} {unit}"
    return f"{n_bytes:.0f} B"


def cost(resource: str, value: float) -> str:
    """An amount of a resource by its name: ``8.07 MB``, ``0.52 ms per token``."""
    if resource == STORAGE:
        return size(value)
    if resource == LATENCY:
        return f"{significant(value)} ms per token"
    if resource.startswith("bytes"):
        return f"{size(value)} per token"
    return f"{significant(value / 1e6)} M {short_name(resource)} per token"


def significant(value: float, digits: int = 3) -> str:
    """`value` with at least `digits` significant digits and no exponent for common sizes."""
    if not math.isfinite(value):
        return _UNKNOWN
    if value == 0:
        return "0"
    rounded = f"{value:.{digits - 1}e}"  # 999.9 has the digits of 1000
    magnitude = int(rounded.partition("e")[2])
    if not -5 <= magnitude < 7:
        return rounded
    return f"{value:.{max(digits - 1 - magnitude, 0)}f}"


def plus_minus(value: float, standard_error: float) -> str:
    """``0.971 ± 0.003``; without the error where it is 0 or not known."""
    if not math.isfinite(value):
        return _UNKNOWN
    if not math.isfinite(standard_error) or standard_error <= 0:
        return fixed(value)
    # As many decimals as the first digit of the error needs, five at most.
    wanted = min(-math.floor(math.log10(standard_error)), 5)
    digits = max(fixed_digits(value), wanted)
    return f"{value:.{digits}f} ± {max(standard_error, 10.0**-digits):.{digits}f}"


def signed(value: float, standard_error: float) -> str:
    """As `plus_minus`, for a difference: ``+0.012 ± 0.003``."""
    return ("+" if value > 0 else "") + plus_minus(value, standard_error)


def fixed(value: float) -> str:
    """Three decimals for values around 1, fewer for larger ones."""
    return f"{value:.{fixed_digits(value)}f}" if math.isfinite(value) else _UNKNOWN


def fixed_digits(value: float) -> int:
    """Decimals that `fixed` shows."""
    return 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1


def duration(seconds: float) -> str:
    """``4 min 12 s``, ``2 h 05 min`` or ``3.2 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def count(value: float) -> str:
    """``241,664``."""
    return f"{value:,.0f}"
