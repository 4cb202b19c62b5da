"""Digests that are equal in every process for equal values."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; refuses NaN so that digests stay comparable."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """128-bit BLAKE2b of the canonical JSON of `value`, as 32 hex digits."""
    return digest_bytes(canonical_json(value).encode())


def digest_bytes(data: bytes | memoryview) -> str:
    """128-bit BLAKE2b of raw bytes, as 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def derived_seed(*parts: int | str) -> int:
    """A 31-bit seed that depends on the parts alone, never on call order."""
    return int(digest(list(parts))[:8], 16) & 0x7FFFFFFF
