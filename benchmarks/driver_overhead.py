"""What a driver adds to each trial: trials of almost no work, on one context.

Usage: python benchmarks/driver_overhead.py [--trials N] [--out results/driver_overhead.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from autocompress.drivers.local import LocalDriver
from autocompress.drivers.ray import RayDriver
from autocompress.search.driver import Driver
from autocompress.search.run_trial import run_trial
from autocompress.testing.driver_contract import scripted, scripted_context

REQUESTS = [scripted(i, f"rtn(bits={i},group_size=16)") for i in range(2, 9)]


def measure(make_driver: Callable[[], Driver], n_trials: int) -> dict[str, float]:
    """Seconds until the first result, then milliseconds per trial."""
    started = time.perf_counter()
    requests = (REQUESTS[i % len(REQUESTS)] for i in range(n_trials))
    with closing(make_driver()) as driver, closing(driver.run(requests)) as results:
        next(results)
        first = time.perf_counter()
        n_rest = sum(1 for _ in results)
        rest = time.perf_counter() - first
    return {
        "seconds_to_first_result": round(first - started, 3),
        "ms_per_trial": round(1e3 * rest / n_rest, 3),
    }


def in_process(n_trials: int, root: Path) -> float:
    """Milliseconds of `run_trial` alone, the median."""
    context = scripted_context(root)
    seconds = []
    for i in range(n_trials):
        started = time.perf_counter()
        run_trial(REQUESTS[i % len(REQUESTS)], context=context)
        seconds.append(time.perf_counter() - started)
    return round(1e3 * statistics.median(seconds), 3)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("results/driver_overhead.json"))
    arguments = parser.parse_args()
    n = arguments.trials
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        drivers: dict[str, Callable[[], Driver]] = {
            "local": lambda: LocalDriver(scripted_context(root)),
            "ray_1_worker": lambda: RayDriver(scripted_context(root), workers=1),
            "ray_2_workers": lambda: RayDriver(scripted_context(root), workers=2),
        }
        result = {
            "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
            "trials": n,
            "run_trial_alone_ms": in_process(n, root),
            "drivers": {name: measure(make, n) for name, make in drivers.items()},
        }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
