"""Memory of a process as Linux counts it."""

from __future__ import annotations

import re
from pathlib import Path

NOW, MOST = "VmRSS", "VmHWM"


def resident_bytes(what: str = NOW, process: Path = Path("/proc/self")) -> int:
    """What a process holds in memory, shared pages included.

    Args:
        what: `NOW`, or `MOST` at any time.
        process: its folder.

    Raises:
        OSError: there is no such process.
    """
    found = re.search(rf"{what}:\s+(\d+) kB", (process / "status").read_text("utf-8"))
    return 1024 * int(found[1]) if found else 0  # one that is ending holds nothing
