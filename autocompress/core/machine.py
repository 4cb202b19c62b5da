"""What the system says of this machine."""

from __future__ import annotations

import math
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """Name of the processor as the system states it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def cache_directory() -> Path:
    """The user's cache of this package; need not exist."""
    named = os.environ.get("AUTOCOMPRESS_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autocompress"


def usable_cores() -> int:
    """Cores that this process may use: by its affinity and, in a container, by its quota."""
    affine = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    return max(1, min(cores, cpu_quota()))


def cpu_quota(file: Path = _CPU_QUOTA) -> int:
    """Cores that the control group of this process is granted, rounded up; very many if all are.

    Args:
        file: microseconds granted and the period that they are granted in, as Linux's cgroup v2
            has it; may be missing.
    """
    try:
        granted, period = file.read_text(encoding="ascii").split()
        return math.ceil(int(granted) / int(period))
    except (OSError, ValueError):  # another system, or "max": no quota
        return sys.maxsize


def memory_bytes() -> int:
    """Physical memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
