"""Time the methods and write results/methods_speed.json.

Run on an idle machine: ``python benchmarks/methods_speed.py``. Seconds are the least of several
repeats; the first run of a decomposition and its reuse are timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress, decode

SHAPES = ((384, 1536), (2048, 2048))
SCHEMES = (
    "rtn(bits=4)",
    "gptq(bits=4)",
    "magnitude",
    "wanda",
    "wanda+gptq(bits=4)",
    "svd(rank=128)",
    "svd_llm(rank=128)",
    "svd_llm(rank=128)+gptq(bits=4)",
)
DECODED = (
    "rtn(bits=8)", "rtn(bits=4)", "rtn(bits=3)", "rtn(bits=4,symmetric=false)", "wanda",
    "wanda+rtn(bits=4)", "svd(rank=128)+rtn(bits=4)",
)  # fmt: skip


def best_seconds(action: Callable[[], object], repeats: int) -> float:
    """Least wall time of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return round(min(seconds), 6)


def layer(out_features: int, in_features: int) -> tuple[torch.Tensor, LayerStatistics]:
    """Random weight with the statistics of correlated inputs, four tokens per input."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    inputs = torch.randn(4 * in_features, in_features, generator=generator)
    inputs *= torch.logspace(-1, 1, in_features)
    n_tokens = len(inputs)
    return weight, LayerStatistics(inputs.T @ inputs / n_tokens, n_tokens, "benchmark")


def measure(shape: tuple[int, int], repeats: int) -> dict[str, object]:
    """Seconds to compress (decompositions new, then shared) and to decode."""
    weight, statistics = layer(*shape)
    shared = LayerProblem(weight, statistics)
    fresh, reused, decoding = {}, {}, {}
    for text in SCHEMES:
        scheme = Scheme.parse(text)
        fresh[text] = best_seconds(partial(compress, weight, scheme, statistics), repeats)
        compress(weight, scheme, statistics, problem=shared)
        reused[text] = best_seconds(
            partial(compress, weight, scheme, statistics, problem=shared), repeats
        )
    for text in DECODED:
        stored = compress(weight, Scheme.parse(text), statistics, problem=shared)
        decoding[text] = {
            str(dtype).removeprefix("torch."): best_seconds(
                partial(decode, stored.tensors, stored.scheme, stored.shape, dtype), 5 * repeats
            )
            for dtype in (torch.float32, torch.bfloat16)
        }
    return {
        "shape": list(shape),
        "compress_seconds": fresh,
        "compress_seconds_with_shared_decompositions": reused,
        "decode_seconds": decoding,
    }


def main() -> None:
    """Measure every shape and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/methods_speed.json"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    document = {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "layers": [measure(shape, arguments.repeats) for shape in SHAPES],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
