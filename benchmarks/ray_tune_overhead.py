"""What Ray Tune adds to each trial, against our own Ray driver: trials of almost no work.

The same random study of the same small model runs on two workers each time: by `Study` on
`RayDriver` (as ``autocompress search --driver ray``) and by ``Tuner.fit`` with the searcher and
the trainable of `autocompress.integrations.ray_tune`.

Usage: python benchmarks/ray_tune_overhead.py [--trials N] [--out results/ray_tune_overhead.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from autocompress.drivers.ray import RayDriver, start_ray, stop_ray
from autocompress.integrations.ray_tune import AutocompressSearcher, trials_of, with_context
from autocompress.search import SAMPLERS, Budget, Journal, Study
from autocompress.testing.driver_contract import scripted_context, scripted_space

import ray  # isort: skip - after autocompress has prepared its environment
from ray import tune  # isort: skip

WORKERS = 2
COLD_TRIALS = 4
SPACE = scripted_space(group_sizes=(8, 16, 32))
LOGGERS = "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"


class Clock(tune.Callback):
    """Notes when each trial ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """One more."""
        self.ends.append(time.perf_counter())


def summary(started: float, ends: list[float], seconds: list[float]) -> dict[str, float]:
    """Seconds until the first result, then milliseconds per trial, and those inside `run_trial`."""
    return {
        "trials": len(ends),
        "seconds_to_first_result": round(ends[0] - started, 2),
        "ms_per_trial": round(1e3 * (ends[-1] - ends[0]) / (len(ends) - 1), 2),
        "run_trial_ms": round(1e3 * statistics.median(seconds), 2),
    }


def ray_driver(root: Path, n_trials: int) -> dict[str, float]:
    """A study on long-lived actors."""
    ends: list[float] = []
    started = time.perf_counter()
    with (
        Journal(root / "trials.jsonl") as journal,
        closing(RayDriver(scripted_context(root / "bank"), workers=WORKERS)) as driver,
    ):
        sampler = SAMPLERS["random"](SPACE, seed=0)
        study = Study(
            SPACE,
            sampler,
            driver,
            journal,
            Budget.parse(f"{n_trials} trials"),
            racing=None,
            progress=lambda _: ends.append(time.perf_counter()),
        )
        results = study.run()
    return summary(started, ends, [r.seconds for r in results])


def ray_tune(root: Path, n_trials: int, *, reuse: bool, loggers: bool) -> dict[str, float]:
    """The same study by Tune."""
    os.environ[LOGGERS] = "0" if loggers else "1"
    clock = Clock()
    started = time.perf_counter()
    tuner = tune.Tuner(
        with_context(scripted_context(root / "bank"), SPACE),
        tune_config=tune.TuneConfig(
            search_alg=AutocompressSearcher(SPACE, sampler="random", seed=0),
            num_samples=n_trials,
            max_concurrent_trials=WORKERS,
            reuse_actors=reuse,
        ),
        run_config=tune.RunConfig(
            name="overhead", storage_path=str(root), callbacks=[clock], verbose=0
        ),
    )
    results = tuner.fit()
    return summary(started, clock.ends, [r.seconds for r in trials_of(results)])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("results/ray_tune_overhead.json"))
    arguments = parser.parse_args()
    n = arguments.trials
    start_ray(WORKERS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            runs = {
                "ray_driver": ray_driver(root / "driver", n),
                "tune_reuse_actors_no_loggers": ray_tune(root / "a", n, reuse=True, loggers=False),
                "tune_reuse_actors": ray_tune(root / "b", n, reuse=True, loggers=True),
                "tune_new_actor_per_trial": ray_tune(
                    root / "c", COLD_TRIALS, reuse=False, loggers=False
                ),
            }
    finally:
        stop_ray()
    result = {
        "machine": {
            "cores": os.cpu_count(),
            "platform": platform.platform(),
            "ray": ray.__version__,
        },
        "workers": WORKERS,
        "runs": runs,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
