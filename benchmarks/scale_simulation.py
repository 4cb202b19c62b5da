"""What 1, 8, 64 and 512 workers would do: simulated, from measured costs and stated assumptions.

Nothing here runs a model. Costs of trials and of the driver are read from `results/`. Writes
results/scale_simulation.json, results/scale_simulation.svg and the block of docs/scale.md.

Usage: python benchmarks/scale_simulation.py
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scale_plot import Line, panels
from simulated_search import Evolution, Objective, Sampler, Surrogate, search_gaps
from simulated_study import Scenario, Simulation

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "results", ROOT / "docs" / "scale.md"
WORKERS = (1, 8, 64, 512)
STUDY_TRIALS = 2000
LIFETIMES = {"never": math.inf, "24 h": 86400.0, "2 h": 7200.0, "30 min": 1800.0}
AT_TRIALS = (250, 500, 1000, 2000)
SEEDS = (0, 1, 2)
SAMPLERS: dict[str, Callable[[Objective, int], Sampler]] = {
    "evolution": Evolution,
    "surrogate": Surrogate,
}
ASSUMED: dict[str, tuple[Any, str]] = {
    "stop_shares": ((0.5, 0.2), "assumed: half of the trials stop after 1/4, a fifth after 1/2"),
    "lifetime_seconds": (7200.0, "assumed: a worker on reclaimable machines lives 2 h on average"),
    "short_trial_seconds": (1.0, "assumed: a trial of a small model on a GPU"),
}


def driver_costs(results: Path) -> dict[str, Any]:
    """Seconds of the driver per ask and per tell, with their origin."""
    overhead = json.loads((results / "sampler_overhead.json").read_text())
    ray = json.loads((results / "driver_overhead.json").read_text())
    name = "guided" if "guided" in overhead["samplers"] else "nsga2"
    ms = {k: v["last_50_median_ms"] for k, v in overhead["samplers"][name].items()
          if isinstance(v, dict)}  # fmt: skip
    mirror = overhead["samplers"][name]["mirror_ms_per_trial"]
    message = max(0.0, ray["drivers"]["ray_1_worker"]["ms_per_trial"] - ray["run_trial_alone_ms"])
    return {
        "ask_seconds": ms["ask"] / 1e3,
        "tell_seconds": (ms["tell"] + ms["journal"] + mirror + message) / 1e3,
        "restart_seconds": ray["drivers"]["ray_1_worker"]["seconds_to_first_result"],
        "origin": f"measured: sampler_overhead.json ({name}, {overhead['choices']} choices, last "
        f"50 of {overhead['trials']} trials), driver_overhead.json (Ray, 1 worker: per trial less "
        "the trial itself; restart = first result of a fresh Ray, an upper bound for a small "
        "model)",
    }


def trial_costs(run: Path) -> dict[str, Any]:
    """Mean seconds and log spread of a search's later trials, once the bank is filled."""
    lines = (run / "trials.jsonl").read_text().splitlines()
    trials = [json.loads(line) for line in lines]
    seconds = [t["seconds"] for t in trials if t["status"] == "complete" and t["seconds"] > 0]
    late = seconds[len(seconds) // 2 :]
    return {
        "trial_seconds": round(statistics.fmean(late), 3),
        "spread": round(statistics.stdev(map(math.log, late)), 3),
        "origin": f"measured: the later {len(late)} trials of results/{run.name}/trials.jsonl",
    }


def scenarios(results: Path) -> tuple[dict[str, Scenario], dict[str, Any]]:
    """By name, and where their numbers are from."""
    driver = driver_costs(results)
    costs = {name: trial_costs(results / name) for name in ("demo", "gemma-3-270m")}
    costs["one-second trials"] = {
        "trial_seconds": ASSUMED["short_trial_seconds"][0],
        "spread": costs["gemma-3-270m"]["spread"],
        "origin": f"{ASSUMED['short_trial_seconds'][1]}; spread of gemma-3-270m",
    }
    shared = Scenario(
        trial_seconds=1.0,
        ask_seconds=driver["ask_seconds"],
        tell_seconds=driver["tell_seconds"],
        stop_shares=ASSUMED["stop_shares"][0],
        lifetime_seconds=ASSUMED["lifetime_seconds"][0],
        restart_seconds=driver["restart_seconds"],
    )
    found = {
        name: replace(shared, trial_seconds=cost["trial_seconds"], spread=cost["spread"])
        for name, cost in costs.items()
    }
    assumptions = {
        "driver": driver,
        **{f"trials: {name}": cost for name, cost in costs.items()},
        **{name: {"value": value, "origin": origin} for name, (value, origin) in ASSUMED.items()},
        "not modelled": {
            "origin": "the cost of waiting on more workers at once, networks, shared disks, a bank "
            "that is still filling; trial times of different trials are independent"
        },
    }
    return found, assumptions


def throughput(scenario: Scenario) -> list[dict[str, Any]]:
    """Asynchronous and in generations of one trial per worker, long runs and one study."""
    rows: list[dict[str, Any]] = []
    for mode in ("asynchronous", "generations"):
        for n in WORKERS:
            generation = n if mode == "generations" else 0
            long = Simulation(scenario, n, max(STUDY_TRIALS, 40 * n), generation=generation).run()
            study = Simulation(scenario, n, STUDY_TRIALS, generation=generation).run()
            total = n * long.makespan
            alone = rows[0]["trials_per_second"] if rows else long.trials_per_second
            rows.append({
                "mode": mode,
                "workers": n,
                "trials_per_second": round(long.trials_per_second, 4),
                "efficiency": round(long.trials_per_second / alone / n, 4),
                "shares": {
                    name: round(getattr(long, name) / total, 4)
                    for name in ("busy", "lost", "restarting", "idle")
                },
                "driver_busy_share": round(long.driver_busy / long.makespan, 4),
                "deaths": long.deaths,
                "failed": long.failed,
                "study_hours": round(study.makespan / 3600, 4),
            })  # fmt: skip
    return rows


def deaths(scenario: Scenario, n_workers: int = 64) -> list[dict[str, Any]]:
    """Efficiency against a worker that never dies."""
    rows = []
    for name, lifetime in LIFETIMES.items():
        changed = replace(scenario, lifetime_seconds=lifetime)
        run = Simulation(changed, n_workers, 40 * n_workers).run()
        rows.append((name, run))
    best = rows[0][1].trials_per_second
    return [
        {
            "lifetime": name,
            "workers": n_workers,
            "trials_per_second": round(run.trials_per_second, 4),
            "relative": round(run.trials_per_second / best, 4),
            "deaths": run.deaths,
            "failed": run.failed,
        }
        for name, run in rows
    ]


def staleness(at_trials: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Gap to the best possible hypervolume, by sampler, mode and trials in flight; means."""
    rows = []
    for name, make in SAMPLERS.items():
        for in_flight in WORKERS:
            for barrier in (False, True) if in_flight > 1 else (False,):
                gaps = [
                    search_gaps(make, at_trials, in_flight, seed, barrier=barrier) for seed in seeds
                ]
                means = [round(statistics.fmean(column), 4) for column in zip(*gaps, strict=True)]
                rows.append({
                    "sampler": name,
                    "in_flight": in_flight,
                    "mode": "generations" if barrier else "asynchronous",
                    "gap_after_trials": dict(zip(map(str, at_trials), means, strict=True)),
                })  # fmt: skip
    return rows


def at_equal_time(scenario: Scenario, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Gap of the surrogate sampler in the time in which asynchronous workers end 1,000 trials."""
    rows = []
    for n in WORKERS[1:]:
        asynchronous = Simulation(scenario, n, 1000).run()
        n_trials = 1000
        while n_trials > n and (
            Simulation(scenario, n, n_trials, generation=n).run().makespan > asynchronous.makespan
        ):
            n_trials -= max(n, 25)
        n_trials = max(n_trials, 1)
        gaps = {
            mode: statistics.fmean(
                search_gaps(Surrogate, (trials,), n, seed, barrier=mode == "generations")[0]
                for seed in seeds
            )
            for mode, trials in (("asynchronous", 1000), ("generations", n_trials))
        }
        rows.append({
            "workers": n,
            "hours": round(asynchronous.makespan / 3600, 3),
            "trials": {"asynchronous": 1000, "generations": n_trials},
            "gap": {mode: round(gap, 4) for mode, gap in gaps.items()},
        })  # fmt: skip
    return rows


def replace_block(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers of `name` in a Markdown file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of docs/scale.md."""
    lines = [
        "| trials of | workers | trials/s | efficiency | in generations | 2,000 trials | "
        "in generations |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, scenario in result["scenarios"].items():
        by_mode = {(r["mode"], r["workers"]): r for r in scenario["throughput"]}
        for n in WORKERS:
            ours, theirs = by_mode["asynchronous", n], by_mode["generations", n]
            lines.append(
                f"| {name} | {n} | {ours['trials_per_second']:.3g} | {ours['efficiency']:.2f} | "
                f"{theirs['efficiency']:.2f} | {ours['study_hours']:.2f} h | "
                f"{theirs['study_hours']:.2f} h |"
            )
    lines += ["", "| trials of | driver saturates at | trials/s at most |", "|---|---|---|"]
    lines += [
        f"| {name} | {s['saturating_workers']:.0f} workers | {s['driver_limit']:.0f} |"
        for name, s in result["scenarios"].items()
    ]
    lines += ["", "| a worker lives | trials/s of 64 workers | deaths | trials given up |",
              "|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {r['lifetime']} | {r['relative']:.3f} of the best | {r['deaths']} | {r['failed']} |"
        for r in result["deaths"]
    ]
    columns = list(result["staleness"][0]["gap_after_trials"])
    lines += ["", "| sampler | in flight | mode | " + " | ".join(f"{c} trials" for c in columns)
              + " |", "|---|---|---" + "|---" * len(columns) + "|"]  # fmt: skip
    for r in result["staleness"]:
        gaps = " | ".join(f"{gap:.3f}" for gap in r["gap_after_trials"].values())
        lines.append(f"| {r['sampler']} | {r['in_flight']} | {r['mode']} | {gaps} |")
    lines += ["", "| workers | asynchronous: trials, gap | generations: trials, gap |",
              "|---|---|---|"]  # fmt: skip
    for r in result["at_equal_time"]:
        cells = (
            f"{r['trials'][mode]}, {r['gap'][mode]:.3f}" for mode in ("asynchronous", "generations")
        )
        lines.append(f"| {r['workers']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(result: Mapping[str, Any]) -> str:
    """Throughput, efficiency and staleness side by side, as SVG."""
    rates, shares, gaps = [], [], []
    for name, scenario in result["scenarios"].items():
        for mode in ("asynchronous", "generations"):
            rows = [r for r in scenario["throughput"] if r["mode"] == mode]
            faint = mode == "generations"
            rates.append(Line(name, [(r["workers"], r["trials_per_second"]) for r in rows], faint))
            shares.append(Line(name, [(r["workers"], r["efficiency"]) for r in rows], faint))
    last = list(result["staleness"][0]["gap_after_trials"])[1]
    for name in SAMPLERS:
        rows = [r for r in result["staleness"]
                if (r["sampler"], r["mode"]) == (name, "asynchronous")]  # fmt: skip
        points = [(r["in_flight"], r["gap_after_trials"][last]) for r in rows]
        gaps.append(Line(name, points))
    return panels(
        "Simulated studies: measured costs, stated assumptions",
        "solid: asynchronous; dashed: generations of one trial per worker",
        [
            ("trials per second", "workers", rates, True),
            ("efficiency against one worker", "workers", shares, False),
            (f"missing hypervolume after {last} trials", "trials in flight", gaps, False),
        ],
    )


def simulate(results: Path = RESULTS) -> dict[str, Any]:
    """Everything but the seconds that it took."""
    found, assumptions = scenarios(results)
    return {
        "assumptions": assumptions,
        "workers": list(WORKERS),
        "scenarios": {
            name: {
                "saturating_workers": round(s.saturating_workers, 1),
                "driver_limit": round(1 / (s.ask_seconds + s.tell_seconds), 2),
                "throughput": throughput(s),
            }
            for name, s in found.items()
        },
        "deaths": deaths(found["gemma-3-270m"]),
        "staleness": staleness(AT_TRIALS, SEEDS),
        "at_equal_time": at_equal_time(found["gemma-3-270m"], SEEDS),
    }


def main() -> None:
    """Simulate, write and draw."""
    started = time.perf_counter()
    result = simulate()
    (RESULTS / "scale_simulation.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "scale_simulation.svg").write_text(picture(result), encoding="utf-8")
    replace_block(DOCS, "simulation", markdown(result))
    print(f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
