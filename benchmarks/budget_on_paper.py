"""Memory and time of searches on 7B, 70B and 400B models, from shapes and measured costs.

Measures the calibration product, the inverse factor and a GPTQ option at a few sizes on one thread
of this machine, fits their laws and extrapolates. No model of these sizes was run: the output says
what is measured, counted from shapes, extrapolated or assumed. Writes results/budget_on_paper.json
and the block of docs/scale.md.

Usage: python benchmarks/budget_on_paper.py [--profile h100-sxm]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_shapes import ARCHITECTURES, Architecture
from numpy.typing import NDArray
from scale_simulation import ASSUMED, DOCS, RESULTS, driver_costs, replace_block, trial_costs
from scipy.optimize import nnls
from simulated_study import Scenario, Simulation

from autocompress.core import Scheme
from autocompress.cost.profiles import PROFILES, DeviceProfile
from autocompress.methods import LayerProblem, LayerStatistics, compress, footprint

LADDER = tuple(Scheme.parse(f"gptq(bits={bits},group_size=128)") for bits in (2, 3, 4, 6, 8))
SIZES = ((512, 512), (1024, 1024), (2048, 1024), (512, 2048), (1024, 2048), (512, 3072))
TOKENS_PER_PRODUCT = 2048
TRIALS, WORKERS = 500, (1, 8, 64)
ASSUMPTIONS: dict[str, tuple[float, str]] = {
    "search_tokens": (16384, "32 sequences of 512 tokens"),
    "calibration_tokens": (131072, "128 sequences of 1,024 tokens"),
    "matmul_share": (0.4, "share of a GPU's peak that forwards and H reach"),
    "factor_share": (0.01, "share of a GPU's bfloat16 peak that factors and sweeps in float32 "
                           "reach"),
    "bank_bytes_per_second": (1e10, "packed options from page cache to a GPU, per GPU"),
    "memory_share": (0.8, "share of a GPU's memory for weights; the rest is activations"),
    "mean_bits": (4.25, "stored bits per weight of a typical trial, all read from the bank"),
    "load_bytes_per_second": (2e9, "checkpoint from disk into a restarted worker, per worker"),
}  # fmt: skip
GEMMA_ACTIVE = 18 * (2 * 640 * 1024 + 2 * 640 * 256 + 3 * 640 * 2048) + 262144 * 640


@dataclass(frozen=True, slots=True)
class Laws:
    """Seconds on one thread: a term for products and one for memory traffic in each step.

    `hessian` n d^2; `factor` d^3 + `factor_memory` d^2; `sweep` o d^2 + `grid` o d.
    """

    hessian: float
    factor: float
    factor_memory: float
    sweep: float
    grid: float

    def factor_seconds(self, d: float) -> float:
        """Of the factor of one H (d, d), shared by all options of its layers."""
        return self.factor * d**3 + self.factor_memory * d**2

    def option_seconds(self, o: float, d: float) -> float:
        """Of one GPTQ option of a layer (o, d) whose factor is there."""
        return self.sweep * o * d**2 + self.grid * o * d


def least_seconds(action: Callable[[], object], repeats: int = 3) -> float:
    """Least processor time of `repeats` runs on this thread, which a busy machine disturbs less."""
    seconds = []
    for _ in range(repeats):
        started = time.thread_time()
        action()
        seconds.append(time.thread_time() - started)
    return round(min(seconds), 6)


def measure(sizes: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """Seconds of the calibration product, the factor and a GPTQ option, on one thread."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for o, d in sizes:
        inputs = torch.randn(TOKENS_PER_PRODUCT, d, generator=generator)
        statistics = LayerStatistics(
            inputs.T @ inputs / TOKENS_PER_PRODUCT, TOKENS_PER_PRODUCT, "benchmark"
        )
        weight = torch.randn(o, d, generator=generator) * 0.02
        shared = LayerProblem(weight, statistics)

        def factor(w: torch.Tensor = weight, s: LayerStatistics = statistics) -> object:
            return LayerProblem(w, s).inverse_factor(by_activation=True, damping=0.01)

        def option(p: LayerProblem = shared) -> object:
            return compress(p.weight, LADDER[2], p.statistics, problem=p)

        option()  # `shared` now holds its factor
        rows.append({
            "out_features": o,
            "in_features": d,
            "hessian_seconds": least_seconds(lambda x=inputs: x.T @ x),  # type: ignore[misc]
            "factor_seconds": least_seconds(factor),
            "option_seconds": least_seconds(option),
        })  # fmt: skip
    return rows


def fit(rows: Sequence[Mapping[str, float]]) -> tuple[Laws, dict[str, float]]:
    """The laws, and by how much each misses its worst size.

    Coefficients minimise squared relative errors, so that small sizes count as large ones. The
    products of a sweep, o d^2 operations that small sizes do not show, are taken to run at the
    rate of the calibration product, 2 n d^2 operations; only `grid` is fitted to options.
    """
    o, d = (np.array([float(r[k]) for r in rows]) for k in ("out_features", "in_features"))
    terms = {
        "hessian": (d**2 * TOKENS_PER_PRODUCT)[:, None],
        "factor": np.stack([d**3, d**2], axis=1),
        "option": (o * d)[:, None],
    }
    found, misses = dict[str, list[float]](), {}
    for name, columns in terms.items():
        seconds = np.array([float(r[f"{name}_seconds"]) for r in rows])
        known = found["hessian"][0] / 2 * o * d**2 if name == "option" else np.zeros(len(o))
        share = known / seconds
        coefficients = _nearest(columns / seconds[:, None], 1 - share)
        misses[name] = round(float(abs(columns @ coefficients / seconds + share - 1).max()), 3)
        found[name] = [float(c) for c in coefficients]
    (hessian,), (factor, memory), (grid,) = found["hessian"], found["factor"], found["option"]
    return Laws(hessian, factor, memory, sweep=hessian / 2, grid=grid), misses


def _nearest(columns: NDArray[np.float64], goal: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = columns.max(axis=0)
    solution: NDArray[np.float64] = nnls(columns / scale, goal)[0]
    unscaled: NDArray[np.float64] = solution / scale
    return unscaled


def against_recorded(laws: Laws, results: Path) -> list[dict[str, Any]]:
    """The law of an option against sizes that it was not fitted on (methods_speed.json)."""
    layers = json.loads((results / "methods_speed.json").read_text())["layers"]
    rows = []
    for layer in layers:
        (o, d), recorded = layer["shape"], layer["compress_seconds_with_shared_decompositions"]
        predicted = laws.option_seconds(o, d)
        ratio = round(predicted / recorded["gptq(bits=4)"], 3)
        rows.append({"shape": [o, d], "predicted_over_recorded": ratio})
    return rows


def memory(shape: Architecture, gpu_bytes: float) -> dict[str, float]:
    """Bytes, counted from shapes by the layouts that exports use."""
    bank = sum(m.count * footprint(m.spec, s).storage_bytes for m in shape.matrices for s in LADDER)
    hidden = 2 * _value("search_tokens") * shape.width
    tokens = _value("calibration_tokens") / shape.experts
    return {
        "weights": shape.weights,
        "active_weights": shape.active_weights,
        "choices": shape.choices,
        "resident_model_bytes": 2 * shape.weights,
        "gpus_per_worker": math.ceil(2 * shape.weights / gpu_bytes / _value("memory_share")),
        "bank_bytes": bank,
        "statistics_bytes": sum(4 * m.in_features**2 * m.inputs for m in shape.matrices),
        "prefix_bytes_per_block": int(hidden),
        "prefix_bytes_of_a_trial": int(hidden * shape.blocks),
        "calibration_tokens_per_width": round(tokens / shape.width, 2),
    }


def preparation(shape: Architecture, laws: Laws, profile: DeviceProfile) -> dict[str, Any]:
    """Seconds of each step, done once: on one thread here, and on one GPU by operations.

    Operations: 2 n d^2 of H, 2 d^3 of a factor (two Cholesky and an inverse), o d^2 of a sweep.
    """
    n = _value("calibration_tokens")
    squares = sum(m.in_features**2 * m.inputs * m.active / m.count for m in shape.matrices)
    cubes = sum(m.in_features**3 * m.inputs for m in shape.matrices)
    sweeps = sum(m.n_weights * m.in_features for m in shape.matrices)
    steps = {
        "forward": (None, 2.0 * shape.active_weights * n, "matmul_share"),
        "hessians": (laws.hessian * n * squares, 2.0 * n * squares, "matmul_share"),
        "factors": (
            sum(m.inputs * laws.factor_seconds(m.in_features) for m in shape.matrices),
            2.0 * cubes,
            "factor_share",
        ),
        "options": (
            len(LADDER) * sum(
                m.count * laws.option_seconds(m.out_features, m.in_features)
                for m in shape.matrices
            ),
            float(len(LADDER) * sweeps),
            "factor_share",
        ),
    }  # fmt: skip
    return {
        name: {
            "one_thread_hours": None if seconds is None else round(seconds / 3600, 2),
            "gpu_hours": round(
                operations / profile.flops_per_second / _value(share) / 3600, 4
            ),
        }
        for name, (seconds, operations, share) in steps.items()
    }  # fmt: skip


def trial_seconds(shape: Architecture, profile: DeviceProfile, n_gpus: int) -> dict[str, float]:
    """Of a full trial on one worker: options from the bank, decoding, one forward."""
    rate = profile.flops_per_second * _value("matmul_share") * n_gpus
    bandwidth = profile.bytes_per_second * n_gpus
    operations = 2.0 * shape.active_weights * _value("search_tokens")
    packed = shape.searched_weights * _value("mean_bits") / 8
    seconds = {
        "bank": packed / (_value("bank_bytes_per_second") * n_gpus),
        "decode": (packed + 2.0 * shape.searched_weights) / bandwidth,
        "forward": max(operations / rate, 2.0 * shape.weights / bandwidth),
    }
    return {name: round(s, 4) for name, s in {**seconds, "all": sum(seconds.values())}.items()}


def study(
    shape: Architecture, seconds: float, n_gpus: int, driver: Mapping[str, Any], spread: float
) -> list[dict[str, Any]]:
    """Hours of 500 racing trials, simulated; asks cost in proportion to the choices."""
    scenario = Scenario(
        trial_seconds=seconds,
        spread=spread,
        ask_seconds=driver["ask_seconds"] * shape.choices / 100,
        tell_seconds=driver["tell_seconds"],
        stop_shares=ASSUMED["stop_shares"][0],
        lifetime_seconds=ASSUMED["lifetime_seconds"][0],
        restart_seconds=driver["restart_seconds"]
        + 2 * shape.weights / _value("load_bytes_per_second"),
    )
    rows = []
    for n in WORKERS:
        run = Simulation(scenario, n, TRIALS).run()
        hours = run.makespan / 3600
        rows.append({
            "workers": n,
            "gpus": n * n_gpus,
            "hours": round(hours, 3),
            "gpu_hours": round(hours * n * n_gpus, 2),
            "busy_share": round(run.busy / (n * run.makespan), 3),
        })  # fmt: skip
    return rows


def budget(name: str, laws: Laws, profile: DeviceProfile) -> dict[str, Any]:
    """All of one architecture."""
    shape = ARCHITECTURES[name]
    counted = memory(shape, profile.memory_bytes)
    n_gpus = int(counted["gpus_per_worker"])
    seconds = trial_seconds(shape, profile, n_gpus)
    driver = driver_costs(RESULTS)
    spread = trial_costs(RESULTS / "gemma-3-270m")["spread"]
    return {
        "shapes": asdict(shape),
        "counted": counted,
        "preparation": preparation(shape, laws, profile),
        "trial_seconds": seconds,
        "study_of_500_trials": study(shape, seconds["all"], n_gpus, driver, spread),
    }


def share_here() -> float:
    """Of the default profile's peak, what trials of Gemma 3 270M reach, decoding included."""
    core = PROFILES["cpu-2core-avx512"].flops_per_second / 2  # two workers share two cores
    seconds = float(trial_costs(RESULTS / "gemma-3-270m")["trial_seconds"])
    return round(2.0 * GEMMA_ACTIVE * 2048 / seconds / core, 3)


def _value(name: str) -> float:
    return ASSUMPTIONS[name][0]


def _row(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def markdown(result: Mapping[str, Any]) -> str:
    """The table of docs/scale.md."""
    models = list(result["models"].values())
    counted = [m["counted"] for m in models]

    def size(key: str) -> list[str]:
        return [f"{c[key] / 1e9:,.{0 if c[key] > 1e11 else 1}f} GB" for c in counted]

    lines = [
        _row("", list(result["models"])),
        "|---" * (1 + len(models)) + "|",
        _row("shapes of", [m["shapes"]["like"] for m in models]),
        _row("weights, active", [f"{c['weights'] / 1e9:.1f} B, {c['active_weights'] / 1e9:.1f} B"
                                 for c in counted]),
        _row("resident model, bfloat16 (counted)", size("resident_model_bytes")),
        _row(f"{result['profile']['name']} per worker",
             [f"{c['gpus_per_worker']}" for c in counted]),
        _row("bank, 5 GPTQ options (counted)", size("bank_bytes")),
        _row("statistics on disk (counted)", size("statistics_bytes")),
        _row("prefix cache per block, per trial (counted)",
             [f"{c['prefix_bytes_per_block'] / 1e9:.2f}, "
              f"{c['prefix_bytes_of_a_trial'] / 1e9:.1f} GB" for c in counted]),
        _row("calibration tokens that an H sees, over the width",
             [f"{c['calibration_tokens_per_width']:g}" for c in counted]),
    ]  # fmt: skip
    for step in ("forward", "hessians", "factors", "options"):
        parts = [m["preparation"][step] for m in models]
        cells = [
            f"{p['gpu_hours']:.3g} GPU h"
            + ("" if p["one_thread_hours"] is None else f"; {p['one_thread_hours']:,.0f} thread h")
            for p in parts
        ]
        lines.append(_row(f"{step}, once (extrapolated)", cells))
    lines.append(_row("full trial (extrapolated)",
                      [f"{m['trial_seconds']['all']:.3g} s" for m in models]))  # fmt: skip
    for i, n in enumerate(WORKERS):
        runs = [m["study_of_500_trials"][i] for m in models]
        cells = [f"{60 * r['hours']:.1f} min, {r['gpu_hours']:.2f} GPU h" for r in runs]
        lines.append(_row(f"500 trials, workers: {n} (simulated)", cells))
    return "\n".join(lines)


def main() -> None:
    """Measure, extrapolate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="h100-sxm")
    profile = PROFILES[parser.parse_args().profile]
    result = extrapolate(measure(SIZES), profile)
    (RESULTS / "budget_on_paper.json").write_text(json.dumps(result, indent=1) + "\n")
    replace_block(DOCS, "budget", markdown(result))


def extrapolate(rows: Sequence[Mapping[str, float]], profile: DeviceProfile) -> dict[str, Any]:
    """The whole output from measured sizes."""
    laws, misses = fit(rows)
    return {
        "measured": {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "threads": 1,
            "sizes": [dict(row) for row in rows],
            "peak_share_of_gemma_3_270m_trials": share_here(),
        },
        "fitted": {
            "laws": asdict(laws),
            "worst_relative_miss": misses,
            "option_law_on_other_sizes": against_recorded(laws, RESULTS),
        },
        "assumed": {k: {"value": v, "meaning": m} for k, (v, m) in ASSUMPTIONS.items()},
        "profile": profile.to_json(),
        "models": {name: budget(name, laws, profile) for name in ARCHITECTURES},
    }


if __name__ == "__main__":
    main()
