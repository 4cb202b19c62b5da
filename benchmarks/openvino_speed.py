"""Tokens per second of OpenVINO exports of a causal model, beside torch in float32.

    python benchmarks/openvino_speed.py MODEL --out results/deploy/openvino_gemma3_270m.json

Every layer of the model has one scheme. All contenders take turns in one process, on the same
number of threads; the median of the rounds counts, and only the ratios of one run mean anything.
Decode is a token at a time, of one text; prefill reads one text at once and gives the logits of all
its tokens. ``exact`` is OpenVINO in
float32 as exports are verified, ``default`` as OpenVINO runs on this CPU if nothing is said: it may
round activations, and keys and values, to 8 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from autocompress.core import Scheme
from autocompress.core.machine import cpu_model
from autocompress.core.scheme import BASE_SCHEME
from autocompress.export.openvino import OpenVino
from autocompress.export.openvino_client import EXACT, OpenVinoModule, compiled
from autocompress.methods import LayerStatistics, compress, decode
from autocompress.models import BaseModel, load_base_model, overridden, weight_matrix
from autocompress.report.provenance import installed_versions

SCHEMES = ("base", "rtn(bits=8,group_size=128)", "rtn(bits=4,group_size=128)")
Contender = tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]
"""A prefill that starts anew, and a step that goes on."""


def main() -> None:
    """Run from the command line."""
    options = _options()
    torch.set_num_threads(options.threads)
    base = load_base_model(str(options.model), "AutoModelForCausalLM", dtype="float32")
    n_words = cast(Any, base.module.config).vocab_size
    ids = torch.randint(5, n_words, (1, options.prompt))
    contenders = {"torch float32": _torch(base.module)}
    rows: dict[str, dict[str, Any]] = {"torch float32": {"bytes": base.layout.base_bytes}}
    with tempfile.TemporaryDirectory() as folder:
        for number, scheme in enumerate(options.schemes):
            path = Path(folder) / str(number)
            expected, size = _export(base, scheme, path, ids)
            for name, settings in (("exact", EXACT), ("default", {})):
                model = compiled(path, settings)
                off = (model(ids).logits - expected).abs().max() / expected.abs().max()
                label = f"openvino {scheme} {name}"
                rows[label] = {"bytes": size, "largest_logit_error": float(off)}
                contenders[label] = _openvino(model)
        timings = _race(contenders, ids, options.rounds, options.steps)
    for label, (prefill, decoded) in timings.items():
        rows[label] |= {
            "prefill_tokens_per_second": ids.shape[1] / prefill,
            "decode_tokens_per_second": 1 / decoded,
        }
    _write(options, rows)


def _export(base: BaseModel, scheme: str, path: Path, ids: Tensor) -> tuple[Tensor, int]:
    """Write the model with one scheme everywhere; torch's logits with these weights, and bytes."""
    parsed = BASE_SCHEME if scheme == "base" else Scheme.parse(scheme)
    weights = {}
    if not parsed.is_base:
        for layer in base.layout.layers:
            matrix = weight_matrix(base.module, layer)
            weights[layer.name] = compress(matrix, parsed, LayerStatistics.none())
    manifest = OpenVino().write(base, weights, path, claim={})
    dense = {n: decode(w.tensors, w.scheme, w.shape, torch.float32) for n, w in weights.items()}
    with torch.no_grad(), overridden(base.module, base.layout, dense):
        return base.module(ids).logits, manifest.storage_bytes


def _torch(module: nn.Module) -> Contender:
    state: dict[str, Any] = {}

    def run(ids: Tensor, cache: Any) -> None:
        with torch.no_grad():
            found = module(ids, past_key_values=cache, use_cache=True)
        state["cache"] = found.past_key_values

    return lambda ids: run(ids, None), lambda ids: run(ids, state["cache"])


def _openvino(model: OpenVinoModule) -> Contender:
    return model, model.extend


def _race(
    contenders: dict[str, Contender], ids: Tensor, rounds: int, steps: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of a prefill and of a step, by contender; the first round is not counted."""
    prefills: dict[str, list[float]] = {name: [] for name in contenders}
    decodes: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, (prefill, step) in contenders.items():
            start = time.perf_counter()
            prefill(ids)
            seconds = [time.perf_counter() - start]
            for position in range(steps):
                start = time.perf_counter()
                step(ids[:, position : position + 1])
                seconds.append(time.perf_counter() - start)
            if number:
                prefills[name].append(seconds[0])
                decodes[name] += seconds[1:]
    return {
        name: (statistics.median(prefills[name]), statistics.median(decodes[name]))
        for name in contenders
    }


def _write(options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    reference = rows["torch float32"]
    for row in rows.values():
        for what in ("prefill", "decode"):
            key = f"{what}_tokens_per_second"
            row[f"{what}_over_torch"] = row[key] / reference[key]
    document = {
        "model": options.model.name,
        "threads": options.threads,
        "prompt_tokens": options.prompt,
        "steps": options.steps,
        "rounds": options.rounds,
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "rows": rows,
        "cpu": cpu_model(),
        "versions": installed_versions(("openvino", "torch", "transformers")),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    for label, row in rows.items():
        print(
            f"{label:50} {row['bytes'] / 1e6:8.1f} MB  prefill {row['prefill_over_torch']:6.2f}x  "
            f"decode {row['decode_over_torch']:6.2f}x  {row['decode_tokens_per_second']:.1f} tok/s"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
