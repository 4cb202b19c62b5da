"""What rotated layers cost when a model runs: plain layers, rotated by C, rotated by two products.

    python benchmarks/rotation_speed.py --model MODEL

A causal model of 4 bits in groups of 128, rounded to nearest, as a packed checkpoint in float32;
all layers of the blocks plain or rotated, the rest always plain. All run on the kernels in C, so
that no arm has others by chance. The arms take turns, one thread, by the clock of the process,
which stands still while other jobs run; the median counts. A prefill gives the logits of its last
token; decode is a token at a time. Then one rotation alone: microseconds of a call, least of the
rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from llama_cpp_speed import Turn, race, torch_turn
from torch import Tensor, nn

from autocompress import load
from autocompress.core import Scheme
from autocompress.core.machine import cpu_model
from autocompress.export import write_packed
from autocompress.export.modules import PackedModule
from autocompress.kernels import Kernel, basis, dispatch, timing
from autocompress.kernels.basis import Entrance, entrance
from autocompress.kernels.dispatch import candidates
from autocompress.methods import LayerStatistics, compress
from autocompress.methods.schemes import plan
from autocompress.models import BaseModel, load_base_model, weight_matrix
from autocompress.workflows.settings import resolve_model

ROOT = Path(__file__).resolve().parents[1]
PLAIN = Scheme.parse("rtn(bits=4,group_size=128)")
ROTATED = Scheme.parse("hadamard+rtn(bits=4,group_size=128)")
C, PRODUCTS = "rotated by C", "rotated by two products"
SIZES = (640, 1024, 2048)
ROWS = (1, 128)
_SECONDS = 0.02  # of a round of calls


def main() -> None:
    """Run from the command line."""
    options = _options()
    torch.set_num_threads(1)
    timing.clock = time.process_time
    base = load_base_model(resolve_model(options.model), "AutoModelForCausalLM", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        plain, by_c, by_products = (
            load(path, dtype="float32", kernels="auto") for path in checkpoints(base, Path(folder))
        )
        models = {"plain": plain, C: by_c, PRODUCTS: by_products}
        turns = {name: torch_turn(module, "process_time") for name, module in models.items()}
        turns[PRODUCTS] = by_two_products(turns[PRODUCTS])
        ids = [10 + 7 * i for i in range(options.prompt)]
        with mock.patch.object(dispatch, "candidates", in_c):
            found = race(turns, ids, ids[: options.steps], options.rounds)
        document = {
            "what": "one thread; milliseconds of the model, microseconds of one rotation",
            "model": Path(options.model).name,
            "schemes": {"plain": str(PLAIN), "rotated, layers of the blocks": str(ROTATED)},
            "clock": "process_time",
            "prompt_tokens": options.prompt,
            "steps": options.steps,
            "rounds": options.rounds,
            "cpu": cpu_model(),
            "torch": torch.__version__,
            "load_average": round(os.getloadavg()[0], 1),
            "rows": {name: row(models[name], found[name], options.prompt) for name in models},
            "rotations": rotations(),
        }
    text = json.dumps(document, indent=1)
    name = f"rotation_{Path(options.model).name.replace('-', '_')}.json"
    out = options.out or ROOT / "results" / "deploy" / name
    out.write_text(text + "\n", "utf-8")
    print(text)


def checkpoints(base: BaseModel, folder: Path) -> tuple[Path, Path, Path]:
    """Where the packed models lie: the plain one, and the rotated one twice."""
    for name, scheme in (("plain", PLAIN), ("rotated", ROTATED)):
        weights = {
            layer.name: compress(
                weight_matrix(base.module, layer),
                PLAIN if layer.block is None else scheme,
                LayerStatistics.none(),
            )
            for layer in base.layout.layers
        }
        write_packed(base, weights, folder / name, claim={})
    return folder / "plain", folder / "rotated", folder / "rotated"


def in_c(*layer: Any) -> tuple[Kernel[Any], ...]:
    """Kernels in C that take a layer."""
    return tuple(k for k in candidates(*layer) if k.name.startswith("native"))


def by_two_products(turn: Turn) -> Turn:
    """The same turn where no rotation has C; layers are prepared in the first."""

    def run(ids: list[int], steps: list[int]) -> list[float]:
        with mock.patch.object(basis, "missing", return_value="not asked for"):
            return turn(ids, steps)

    return run


def row(module: nn.Module, speeds: dict[str, float], prompt: int) -> dict[str, Any]:
    """Milliseconds, and how many layers run on which kernels, by tokens."""
    chosen: dict[str, int] = {}
    for layer in module.modules():
        if isinstance(layer, PackedModule) and layer._runner is not None:
            for n, name in layer._runner.chosen.items():
                chosen[f"{name}, {n} tokens"] = chosen.get(f"{name}, {n} tokens", 0) + 1
    return {
        "decode_ms": round(1000 / speeds["decode_tokens_per_second"], 2),
        "prefill_ms": round(1000 * prompt / speeds["prefill_tokens_per_second"], 1),
        "kernels": dict(sorted(chosen.items())),
    }


def rotations() -> dict[str, dict[str, float]]:
    """Microseconds of one rotation by its size, both ways."""
    step, found = plan(ROTATED).transform, {}
    assert step is not None  # the scheme has one
    for d in SIZES:
        by_c = entrance(step, {}, d, torch.device("cpu"))
        with mock.patch.object(basis, "missing", return_value="not asked for"):
            by_products = entrance(step, {}, d, torch.device("cpu"))
        for n in ROWS:
            rows = torch.randn(n, d)
            ways = {C: by_c, PRODUCTS: by_products}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(9):
                for name, way in ways.items():
                    seconds[name].append(seconds_of(way, rows))
            found[f"{n} x {d}"] = {
                name: round(min(some) * 1e6, 1) for name, some in seconds.items()
            }
    return found


def seconds_of(way: Entrance, rows: Tensor) -> float:
    """Of one call, mean of those that fit a round."""
    calls, start = 0, time.process_time()
    while time.process_time() - start < _SECONDS:
        for _ in range(20):
            way(rows)
        calls += 20
    return (time.process_time() - start) / calls


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder, or package:NAME/FOLDER")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
