"""Compare all samplers on a replay table: whole studies without a single forward pass.

The volume is that of (log10 damage, bytes) under the reference point (the damage of the harshest
allocation, the bytes of the mildest), relative to the best front known: supported points of the
additive part, improved by local search on the true damages, and all that any sampler found. Those
that need predicted damages get those of `--score`, peers of SCORE_OF their own criterion. EvoPress
with its selection in stages runs beside them at one size, its tokens counted, on a noisy replay.

Usage: python benchmarks/replay_samplers.py [--budgets 50 100 300] [--seeds 3]
       [--out results/replay_samplers.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from autocompress.core import TrialRequest, TrialResult, derived_seed
from autocompress.fronts import hypervolume
from autocompress.search import SAMPLERS
from autocompress.search.peers.evopress import evolve
from autocompress.search.solver import sweep
from autocompress.search.study import baselines
from autocompress.testing.replay import ReplayDriver, ReplayTable

TABLE = Path(__file__).parent / "tables" / "minilm_gptq.npz"
SCORE_OF = {"gradient-dp": "gradient", "gradient-lp": "fisher", "hawq": "trace"}
SLOW = {"gp": 50, "tpe": 300, "guided": 300}
"""Samplers of tens of milliseconds or more per proposal, and the most trials that they get."""
LEAST_DAMAGE = 1e-7
NOISE_AT_2048_TOKENS = 0.2
Point = tuple[float, float]


def point(table: ReplayTable, levels: Sequence[int]) -> Point:
    """(log10 damage, bytes)."""
    return math.log10(max(table.damage(levels), LEAST_DAMAGE)), float(table.storage_bytes(levels))


def known_front(table: ReplayTable) -> list[Point]:
    """Supported points of the additive part, and the pairwise local optima next to them."""
    cost = table.split(table.bytes_per_option)
    points = sweep(table.split(table.singles), cost)
    found = {tuple(points.at(k).tolist()) for k in range(len(points))}
    for levels in tuple(found):
        found.add(improved(table, levels))
    return [point(table, levels) for levels in found]


def improved(table: ReplayTable, start: tuple[int, ...]) -> tuple[int, ...]:
    """Local search over swaps of one level up and one down that cost no more bytes."""
    best, damage = start, table.damage(start)
    limit, n_levels = table.storage_bytes(start), [len(c.options) for c in table.space.choices]
    for up in range(len(start)):
        for down in range(len(start)):
            levels = list(best)
            if up == down or levels[up] == n_levels[up] - 1 or levels[down] == 0:
                continue
            levels[up] += 1
            levels[down] -= 1
            if table.storage_bytes(levels) <= limit and table.damage(levels) < damage:
                best, damage = tuple(levels), table.damage(levels)
    return best


def run(table: ReplayTable, name: str, score: str, seed: int, n_trials: int) -> dict[str, Any]:
    """Points in the order of the trials, and the seconds that ask and tell took."""
    sampler = SAMPLERS[name](table.space, seed=seed, table=table.option_table(score))
    driver = ReplayDriver(table)
    results: list[TrialResult] = []
    fixed = baselines(table.space)
    started = time.process_time()
    for number in range(n_trials):
        if number < len(fixed):
            request = TrialRequest(number, fixed[number][1], f"baseline:{fixed[number][0]}")
        else:
            request = TrialRequest(number, sampler.ask(number), f"sampler:{name}")
        result = driver.answer(request)
        sampler.tell(result)
        results.append(result)
    seconds = time.process_time() - started
    choices = table.space.choices
    points = []
    for result in results:
        if result.request.allocation in table.space:
            encoded = table.space.encode(result.request.allocation)
            points.append(point(table, [encoded[c.name] for c in choices]))
        else:
            points.append((math.inf, math.inf))  # the base model
    return {"points": points, "ms_per_trial": 1e3 * seconds / n_trials}


def staged_evopress(table: ReplayTable, max_bytes: float, seed: int) -> list[dict[str, float]]:
    """The paper's search at one size: tokens spent and true damage after each generation."""

    def evaluate(levels: Sequence[int], tokens: int, draw: int) -> float:
        spread = NOISE_AT_2048_TOKENS * math.sqrt(2048 / tokens)
        key = derived_seed("draw", seed, draw, "".join(map(str, levels)))
        return table.damage(levels) * math.exp(spread * np.random.default_rng(key).normal())

    costs = table.split(table.bytes_per_option)
    steps = evolve(costs, max_bytes, evaluate, generations=30, seed=seed)
    return [{"tokens": g.tokens, "damage": table.damage(g.parent)} for g in steps]


def summary(
    runs: dict[str, list[dict[str, Any]]], budgets: Sequence[int], table: ReplayTable
) -> dict[str, Any]:
    """Relative volumes, mean and standard deviation over seeds, by sampler and budget."""
    known = known_front(table)
    n_levels = [len(choice.options) for choice in table.space.choices]
    mildest = point(table, [n - 1 for n in n_levels])
    reference = (point(table, [0] * len(n_levels))[0], mildest[1])
    everything = known + [p for each in runs.values() for r in each for p in r["points"]]
    best = hypervolume(everything, reference)
    rows: dict[str, Any] = {}
    for name, each in runs.items():
        row: dict[str, Any] = {
            "ms_per_trial": round(float(np.mean([r["ms_per_trial"] for r in each])), 2)
        }
        for budget in budgets:
            if len(each[0]["points"]) >= budget:
                volumes = [hypervolume(r["points"][:budget], reference) / best for r in each]
                row[str(budget)] = {
                    "mean": round(float(np.mean(volumes)), 5),
                    "sd": round(float(np.std(volumes)), 5),
                }
        rows[name] = row
    return {
        "reference": {"log10_damage": reference[0], "bytes": reference[1]},
        "known_front_without_samplers": round(hypervolume(known, reference) / best, 5),
        "samplers": rows,
    }


def show(result: dict[str, Any], budgets: Sequence[int], console: Console) -> None:
    """The volumes as a table."""
    shown = Table("sampler", *(f"{b} trials" for b in budgets), "ms per trial")
    order = result["samplers"].items()
    for name, row in sorted(order, key=lambda item: -item[1].get("100", {"mean": 0})["mean"]):
        cells = [
            f"{row[str(b)]['mean']:.4f} ± {row[str(b)]['sd']:.4f}" if str(b) in row else "-"
            for b in budgets
        ]
        shown.add_row(name, *cells, f"{row['ms_per_trial']:.1f}")
    console.print(shown)


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--score", default="fisher")
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 100, 300])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--out", type=Path, default=Path("results/replay_samplers.json"))
    arguments = parser.parse_args()
    table = ReplayTable.load(arguments.table)
    most = max(arguments.budgets)
    console = Console(width=110)
    runs = {}
    for name in arguments.samplers:
        score = SCORE_OF.get(name, arguments.score)
        n_trials = min(most, SLOW.get(name, most))
        runs[name] = [run(table, name, score, s, n_trials) for s in range(arguments.seeds)]
        console.print(f"{name}: {n_trials} trials x {arguments.seeds} seeds")
    low, high = (float(sum(f(c) for c in table.split(table.bytes_per_option))) for f in (min, max))
    result = {
        "table": {"file": arguments.table.name, "model": table.facts["model"]},
        "score": {name: SCORE_OF.get(name, arguments.score) for name in runs},
        "seeds": arguments.seeds,
        **summary(runs, arguments.budgets, table),
        "staged_evopress": {
            "noise_at_2048_tokens": NOISE_AT_2048_TOKENS,
            "searched_bytes": round(low + (high - low) / 4),
            "generations": staged_evopress(table, low + (high - low) / 4, 0),
        },
    }
    show(result, arguments.budgets, console)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
