"""Whether the bank holds what a search compresses."""

from __future__ import annotations

from math import ceil

from autocompress.spaces import SearchSpace

_HEADERS = 1.05  # files are a little larger than their tensors


def bank_need(space: SearchSpace) -> int:
    """Bytes of every layer under every option but the base, from shapes alone."""
    return sum(
        option.storage_bytes
        for choice in space.choices
        for option in choice.options
        if not option.is_base
    )


def small_bank(space: SearchSpace, capacity_bytes: int) -> str:
    """What to say where the options of a space exceed the bound of the bank; else empty."""
    need = _HEADERS * bank_need(space)
    if need <= capacity_bytes:
        return ""
    enough = ceil(need / 1e9) if need > 1e9 else ceil(need / 1e6)
    unit = "GB" if need > 1e9 else "MB"
    return (
        f"The bank is bounded at {capacity_bytes / 1e9:.3g} GB, but the options of this space take "
        f"about {need / 1e9:.3g} GB: those used longest ago are compressed again whenever a trial "
        "asks for them. If the disk has room (else give --cache on one that has): "
        f"--bank-size {enough}{unit}"
    )
