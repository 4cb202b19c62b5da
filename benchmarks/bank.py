"""Measure the layer bank and write results/bank.json.

Run on an idle machine: ``python benchmarks/bank.py``. Layers are random, of the shapes of MiniLM
and of a 1B decoder; inputs are correlated. Four things: what all widths of a layer cost over one
(and which step of it), bytes of entries over what they pack, milliseconds of a warm reading, and
two processes that fill one cold bank against one (nothing may be built twice).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from methods_speed import layer as random_layer

from autocompress.bank import Bank
from autocompress.core import LayerSpec, Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress, footprint
from autocompress.methods.grid import best_grid
from autocompress.methods.schemes import plan
from autocompress.models import ModelLayout

LADDER = tuple(Scheme.parse(f"gptq(bits={bits})") for bits in (2, 3, 4, 6, 8))
PRUNED = tuple(Scheme.parse(f"wanda(sparsity={s})+gptq(bits=4)") for s in (0.25, 0.5))
SMALL = tuple(map(Scheme.parse, ("rtn(bits=2)", "rtn(bits=4)", "svd(rank=8)", "wanda")))


class CountingBank(Bank):
    """Counts what it compresses."""

    n_built = 0

    def _build(self, layer: LayerSpec, scheme: Scheme) -> Any:
        self.n_built += 1
        return super()._build(layer, scheme)


def make_bank(root: Path, shape: tuple[int, int], n_layers: int) -> CountingBank:
    """A bank of equal layers with different weights."""
    weight, statistics = random_layer(*shape)
    names = [f"layer{i}" for i in range(n_layers)]
    layers = tuple(
        LayerSpec(n, "up", 0, *shape, "linear", "bfloat16", n, shape[0] * shape[1]) for n in names
    )
    weights = {n: weight.roll(i, 0).bfloat16() for i, n in enumerate(names)}

    def of_layer(spec: LayerSpec) -> LayerStatistics:
        return LayerStatistics(statistics.hessian, statistics.n_tokens, f"benchmark {spec.name}")

    return CountingBank(root, ModelLayout(layers, ("block",), 0, 0), weights, of_layer)


def fill_seconds(
    root: Path,
    shape: tuple[int, int],
    schemes: Sequence[Scheme],
    *,
    n_layers: int = 1,
    n_threads: int = 1,
) -> float:
    """Seconds per layer of filling a cold bank: CPU seconds of a single layer, else wall."""
    bank = make_bank(root, shape, n_layers)
    clock = time.process_time if n_threads == 1 and n_layers == 1 else time.perf_counter
    started = clock()
    bank.fill({f"layer{i}": schemes for i in range(n_layers)}, n_threads=n_threads)
    return (clock() - started) / n_layers


def ladder(shape: tuple[int, int], folder: Path) -> dict[str, Any]:
    """All widths, sparsities and ranks of one layer against one of them; and the steps of one."""
    tag = "x".join(map(str, shape))
    ranks = tuple(Scheme.parse(f"svd_llm(rank={r})") for r in (32, 64, 96, 128))
    one = fill_seconds(folder / f"{tag}-one", shape, LADDER[1:2])
    widths = fill_seconds(folder / f"{tag}-widths", shape, LADDER)
    pruned = fill_seconds(folder / f"{tag}-pruned", shape, (*LADDER, *PRUNED))
    rank = fill_seconds(folder / f"{tag}-rank", shape, ranks[:1])
    all_ranks = fill_seconds(folder / f"{tag}-ranks", shape, ranks)
    return {
        "shape": list(shape),
        "one_width_s": round(one, 3),
        "five_widths_s": round(widths, 3),
        "five_widths_over_one": round(widths / one, 2),
        "five_widths_and_two_sparsities_s": round(pruned, 3),
        "one_rank_s": round(rank, 3),
        "four_ranks_s": round(all_ranks, 3),
        "four_ranks_over_one": round(all_ranks / rank, 2),
        "steps_of_one_width_s": steps(shape),
    }


def steps(shape: tuple[int, int]) -> dict[str, float]:
    """Seconds of the factorisation (shared), of the grid search and of the sweep (per width)."""
    weight, statistics = random_layer(*shape)
    problem = LayerProblem(weight, statistics)
    step = plan(LADDER[1]).quantize
    assert step is not None  # the ladder quantizes
    options = step.options
    marks = [time.process_time()]
    problem.inverse_factor(by_activation=options.actorder, damping=options.damping)
    marks.append(time.process_time())
    best_grid(problem.weight, problem.importance, options)
    marks.append(time.process_time())
    compress(weight, LADDER[1], statistics, problem=problem)
    marks.append(time.process_time())
    factorisation, grid, both = (b - a for a, b in pairwise(marks))
    return {
        "factorisation": round(factorisation, 3),
        "grid_search": round(grid, 3),
        "sweep_and_packing": round(max(0.0, both - grid), 3),
    }


def threads(folder: Path) -> dict[str, float]:
    """Seconds per layer of a ladder with one and with two threads."""
    shape = (384, 384)
    return {
        f"{n}_threads_s_per_layer": round(
            fill_seconds(folder / f"threads{n}", shape, LADDER, n_layers=6, n_threads=n), 3
        )
        for n in (1, 2)
    }


def reading(folder: Path) -> dict[str, Any]:
    """Overhead of entries, and milliseconds of warm readings: first (verified) and later."""
    shape = (384, 384)
    bank = make_bank(folder / "reading", shape, 6)
    names = [layer.name for layer in bank.layout.layers]  # type: ignore[attr-defined]
    bank.fill(dict.fromkeys(names, SMALL))
    packed = sum(footprint(bank.layout.layer(n), s).storage_bytes for n in names for s in SMALL)
    stored = sum(bank.path(n, s).stat().st_size for n in names for s in SMALL)
    warm = make_bank(folder / "reading", shape, 6)
    warm.packed(names[0], LADDER[0])  # digests of code
    milliseconds = []
    for _ in range(3):
        started = time.perf_counter()
        for name in names:
            for scheme in SMALL:
                warm.packed(name, scheme)
        seconds = time.perf_counter() - started
        milliseconds.append(round(1000 * seconds / len(names) / len(SMALL), 3))
    return {
        "shape": list(shape),
        "schemes": list(map(str, SMALL)),
        "bytes_over_packed": round(stored / packed, 4),
        "header_bytes_per_entry": round((stored - packed) / len(names) / len(SMALL)),
        "first_reading_ms": milliseconds[0],
        "later_reading_ms": min(milliseconds[1:]),
    }


def two_processes(folder: Path) -> dict[str, Any]:
    """One process fills a cold bank; then two, side by side, fill another."""
    result: dict[str, Any] = {}
    for n in (1, 2):
        root = folder / f"processes{n}"
        command = [sys.executable, __file__, "--worker", str(root), str(time.time() + 20)]
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(n)]
        answers = [json.loads(worker.communicate()[0]) for worker in workers]
        wall = max(a["stopped"] for a in answers) - min(a["started"] for a in answers)
        result[f"{n}_processes"] = {
            "wall_s": round(wall, 2),
            "built_by_each": sorted(a["built"] for a in answers),
            "entries": len(list(root.glob("??/*.safetensors"))),
        }
    one, two = result["1_processes"], result["2_processes"]
    result["built_twice"] = sum(two["built_by_each"]) - two["entries"]
    result["wall_of_one_over_two"] = round(one["wall_s"] / two["wall_s"], 2)
    return result


def worker(root: Path, start_at: float) -> None:
    """Fill a bank, starting together with the others; print when, and what was built."""
    bank = make_bank(root, (384, 384), 12)
    time.sleep(max(0.0, start_at - time.time()))
    started = time.time()
    for scheme in LADDER:
        bank.prepare({layer.name: scheme for layer in bank.layout.layers})  # type: ignore[attr-defined]
    print(json.dumps({"started": started, "stopped": time.time(), "built": bank.n_built}))


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bank.json"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        worker(Path(arguments.worker[0]), float(arguments.worker[1]))
        return
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document = {
            "machine": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load_average_at_start": load,
            "layers": [ladder(shape, folder) for shape in ((384, 1536), (2048, 2048))],
            "filling_with_threads": threads(folder),
            "reading": reading(folder),
            "cold_filling": two_processes(folder),
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
