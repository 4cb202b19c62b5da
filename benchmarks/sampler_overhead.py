"""What ask, tell, the journal and the Optuna mirror cost per trial.

Usage: python benchmarks/sampler_overhead.py [--choices N] [--trials N]
       [--out results/sampler_overhead.json]
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
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from autocompress.core import (
    Measurement,
    Metrics,
    Quality,
    Resource,
    Scheme,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.search.journal import Journal
from autocompress.search.mirror import Mirror
from autocompress.search.option_table import OptionTable
from autocompress.search.samplers import SAMPLERS
from autocompress.spaces.space import Choice, Option, SearchSpace

N_OPTIONS = 5
T = TypeVar("T")


def make_space(n_choices: int) -> SearchSpace:
    """One layer per choice, five options each."""
    schemes = [Scheme.parse(f"gptq(bits={b},group_size=64)") for b in (2, 3, 4, 6, 8)]
    options = tuple(Option(str(s), (s,)) for s in schemes)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(n_choices)]
    return SearchSpace("benchmark", "", tuple(Choice(n, (n,), options) for n in names))


def make_table(space: SearchSpace) -> OptionTable:
    """Made-up predictions for samplers that need some."""
    count = len(space.choices)
    damage = (N_OPTIONS - np.arange(N_OPTIONS, dtype=np.float64)) ** 2 / 1000.0
    return OptionTable(
        names=tuple(c.name for c in space.choices),
        roles=("query",) * count,
        depths=tuple(i / count for i in range(count)),
        labels=tuple(tuple(o.label for o in c.options) for c in space.choices),
        damage=tuple(damage * (1 + i % 5) for i in range(count)),
        costs={"storage_bytes": (np.arange(N_OPTIONS, dtype=np.float64) + 1.0,) * count},
        fixed={"storage_bytes": 0.0},
    )


def measured(request: TrialRequest, space: SearchSpace) -> TrialResult:
    """A made-up result that samplers can learn from."""
    levels = list(space.encode(request.allocation).values())
    damage = sum((N_OPTIONS - v) ** 2 * (1 + i % 7) for i, v in enumerate(levels)) / 1000
    quality = Quality(1 - damage, 0.01, Measurement(damage, 0.01), {}, 1000)
    size = Resource(float(sum(levels)), "bytes", "analytic")
    metrics = Metrics(quality, {"storage_bytes": size})
    return TrialResult(request, TrialStatus.COMPLETE, metrics, 1.0, 1000)


class Stopwatch:
    """Milliseconds of each call, by name."""

    def __init__(self) -> None:
        self.ms: dict[str, list[float]] = {}

    def run(self, name: str, call: Callable[[], T]) -> T:
        """Call and record."""
        started = time.perf_counter()
        value = call()
        self.ms.setdefault(name, []).append(1e3 * (time.perf_counter() - started))
        return value

    def summary(self) -> dict[str, dict[str, float]]:
        """Means and medians over all calls, and medians over the last fifty."""
        return {
            name: {
                "mean_ms": round(statistics.fmean(values), 3),
                "median_ms": round(statistics.median(values), 3),
                "last_50_median_ms": round(statistics.median(values[-50:]), 3),
            }
            for name, values in self.ms.items()
        }


def measure(name: str, space: SearchSpace, n_trials: int, directory: Path) -> dict[str, object]:
    """Ask, tell, journal and mirror of one sampler."""
    watch, table = Stopwatch(), make_table(space)
    sampler = SAMPLERS[name](space, seed=0, table=table)
    with Journal(directory / f"{name}.jsonl") as journal:
        for number in range(n_trials):
            allocation = watch.run("ask", partial(sampler.ask, number))
            result = measured(TrialRequest(number, allocation, "benchmark"), space)
            watch.run("journal", partial(journal.append, result))
            watch.run("tell", partial(sampler.tell, result))
    resumed = SAMPLERS[name](space, seed=0, table=table)
    with Journal(directory / f"{name}.jsonl") as journal:
        started = time.perf_counter()
        results = journal.read()
        for result in results:
            resumed.tell(result)
        replayed = time.perf_counter() - started
    # Its thread writes while a trial runs; here trials take no time, so it has a turn of its own.
    started = time.perf_counter()
    Mirror(directory / f"{name}.log", space, results).close()
    return {
        **watch.summary(),
        "mirror_ms_per_trial": round(1e3 * (time.perf_counter() - started) / n_trials, 3),
        "mirror_bytes_per_trial": (directory / f"{name}.log").stat().st_size // n_trials,
        "journal_bytes_per_trial": (directory / f"{name}.jsonl").stat().st_size // n_trials,
        "replay_s": round(replayed, 3),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--choices", type=int, default=100)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe", "nsga2", "guided"])
    parser.add_argument("--out", type=Path, default=Path("results/sampler_overhead.json"))
    arguments = parser.parse_args()
    space = make_space(arguments.choices)
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
            "choices": arguments.choices,
            "trials": arguments.trials,
            "samplers": {
                name: measure(name, space, arguments.trials, Path(folder))
                for name in arguments.samplers
            },
        }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
