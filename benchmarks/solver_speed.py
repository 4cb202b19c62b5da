"""How fast the allocation solver is on synthetic models of real sizes.

Usage: python benchmarks/solver_speed.py [--out results/solver_speed.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.search.solver import solve, sweep

SIZES = {"200 layers": (200, 30), "80 blocks of 7 layers": (560, 30)}
N_POINTS = 64


def problem(n_choices: int, n_options: int) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Damages that fall and costs that rise with the level, of very different sizes."""
    generator = np.random.default_rng(0)
    damage = [
        np.sort(generator.random(n_options))[::-1] * np.exp(2 * generator.normal())
        for _ in range(n_choices)
    ]
    cost = [
        np.cumsum(generator.integers(1, 100, n_options)).astype(float) for _ in range(n_choices)
    ]
    return damage, cost


def measured(n_choices: int, n_options: int) -> dict[str, float]:
    """CPU seconds of the whole predicted front, and of one budget."""
    damage, cost = problem(n_choices, n_options)
    started = time.process_time()
    points = sweep(damage, cost)
    wanted = np.linspace(0, len(points) - 1, N_POINTS).astype(int)
    levels = [points.at(int(point)) for point in wanted]
    swept = time.process_time()
    solve(damage, cost, float(points.costs[len(points) // 2]) + 1.0)
    return {
        "choices": n_choices,
        "options": n_options,
        "supported_points": len(points),
        "written_out": len(levels),
        "front_seconds": round(swept - started, 4),
        "one_budget_seconds": round(time.process_time() - swept, 4),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/solver_speed.json"))
    arguments = parser.parse_args()
    result = {
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
        "sizes": {name: measured(*size) for name, size in SIZES.items()},
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
