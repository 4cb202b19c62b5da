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


def worker_peaks() -> dict[int, int]:
    """Peak resident bytes of the Ray workers that live now, by process number."""
    peaks: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::Worker" in (process / "cmdline").read_bytes():
                peaks[int(process.name)] = resident_bytes(MOST, process)
        except OSError:
            continue
    return peaks


def library_bytes() -> int:
    """What this process holds of the code that it runs: pages of programs and libraries."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            counts = ".so" in line or "/bin/" in line
        elif counts and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found
