"""Time kernels beside dense layers and write results/deploy/kernels_<device>.json.

Run on an idle machine: ``python benchmarks/kernels.py``, with ``--device cuda`` on a GPU; option
``--check`` first holds every kernel to its tolerance there, and exits 1 if one is wrong. For each
layer shape and number of tokens: seconds of float32 and bfloat16 dense layers, of each kernel
alone, and of the packed module that a loaded model runs. Ratios are of one run: gain = dense
seconds / seconds. The load of the machine is in the file: on a busy one the figures are rough, but
for ``--busy``: one thread by the clock of the process, which stands still while others run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress.core.scheme import Scheme
from autocompress.export.modules import PackedModule, pack_module, use_kernels
from autocompress.export.plan import PackedLayer
from autocompress.kernels import KERNELS, timing
from autocompress.kernels.dispatch import refusals
from autocompress.kernels.measure import layer_of, random_tensors
from autocompress.kernels.table import device_name
from autocompress.kernels.timing import seconds_of
from autocompress.methods import canonical

SHAPES = {
    "gemma-3-270m query": (1024, 640),
    "gemma-3-270m gate": (2048, 640),
    "gemma-3-270m down": (640, 2048),
    "2048 x 2048": (2048, 2048),
}
SCHEMES = (
    "rtn(bits=8,group_size=0)",
    "rtn(bits=4,group_size=128)",
    "rtn(bits=4,group_size=128,symmetric=false)",
    "rtn(bits=3,group_size=128)",
    "rtn(bits=8,group_size=0)+int_inputs(bits=8)",
    "rtn(bits=7,group_size=0)+int_inputs(bits=8)",
    "svd(rank=128)+rtn(bits=8,group_size=0)",
    "magnitude(pattern=2:4)+rtn(bits=4,group_size=128)",
    "rtn(bits=4,group_size=128)+eora(rank=16)",
)
TOKENS = (1, 512)
ROOT = Path(__file__).resolve().parents[1]


def best(action: Any, device: torch.device, repeats: int = 1) -> float:
    """Least seconds of a few rounds."""
    return float(f"{min(seconds_of(action, device) for _ in range(repeats)):.4g}")


def dense_seconds(
    shape: tuple[int, int], n: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> float:
    """Seconds of a dense layer."""
    weight = torch.randn(shape, device=device).to(dtype)
    rows = torch.randn(n, shape[1], device=device).to(dtype)
    return best(partial(nn.functional.linear, rows, weight), device, repeats)


def measure_scheme(
    shape: tuple[int, int], text: str, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Seconds of each kernel that takes the scheme, and of a packed module, by tokens."""
    scheme = canonical(Scheme.parse(text))
    spec = layer_of(shape, dtype)
    tensors = {name: t.to(device) for name, t in random_tensors(spec, scheme).items()}
    refused = refusals(shape, scheme, dtype, device)
    found: dict[str, Any] = {
        "stored_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "refused": {name: reason for name, reason in refused.items() if reason},
        "extra_bytes": {},
        "tokens": {},
    }
    module = packed_module(shape, scheme, tensors, dtype, device)
    for n in TOKENS:
        rows = torch.randn(n, shape[1], device=device).to(dtype)
        seconds = {}
        for name in (name for name, reason in refused.items() if not reason):
            kernel = KERNELS[name]
            ready = kernel.prepare(tensors, scheme, shape, dtype, device)
            seconds[name] = best(partial(kernel.apply, rows, ready), device, repeats)
            found["extra_bytes"][name] = kernel.extra_bytes(ready)
        with torch.no_grad():
            module(rows)
            assert module._runner is not None
            chosen = module._runner.kernel_for(module.stored(), n).name
            in_module = best(partial(module, rows), device, repeats)
        found["tokens"][n] = {"seconds": seconds, "chosen": chosen, "module": in_module}
    assert module._runner is not None
    found["module_extra_bytes"] = module._runner.extra_bytes
    return found


def packed_module(
    shape: tuple[int, int],
    scheme: Scheme,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> PackedModule:
    """A packed linear layer that runs on kernels."""
    linear = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    layer = PackedLayer("layer", scheme, shape, name, "linear")
    module = pack_module(linear, layer, tensors, dtype)
    use_kernels(module, "auto")
    return module


def measure_shape(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Dense layers, then each scheme beside them in each compute dtype."""
    dense = {
        n: {
            str(dtype).removeprefix("torch."): dense_seconds(shape, n, dtype, device, repeats)
            for dtype in (torch.float32, torch.bfloat16)
        }
        for n in TOKENS
    }
    found: dict[str, Any] = {"shape": list(shape), "dense_seconds": dense, "schemes": {}}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for text in SCHEMES:
            print(f"{shape[0]} x {shape[1]} {name} {text}", flush=True)
            measured = measure_scheme(shape, text, dtype, device, repeats)
            for n, entry in measured["tokens"].items():
                kernel = entry["seconds"].get(entry["chosen"])
                entry["gain_of_kernel"] = {d: round(s / kernel, 3) for d, s in dense[n].items()}
                entry["gain_of_module"] = {
                    d: round(s / entry["module"], 3) for d, s in dense[n].items()
                }
            found["schemes"][f"{text} in {name}"] = measured
    return found


def check(device: torch.device) -> None:
    """Hold every kernel to its tolerance on `device`; leave with status 1 if one is wrong."""
    tests = "tests/unit/kernels" + ("/test_on_gpu.py" if device.type == "cuda" else "")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "--no-header", tests], cwd=ROOT, check=False
    )
    if done.returncode:
        sys.exit(1)


def main() -> None:
    """Check if asked, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.check:
        check(device)
    if arguments.busy:
        torch.set_num_threads(1)
        timing.clock = time.process_time
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.bfloat16,)
    content = {
        "what": "seconds of one layer, weights read from memory; gain = dense / packed, one run",
        "device": device_name(device),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "clock": timing.clock.__name__,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "repeats": arguments.repeats,
        "layers": {
            name: measure_shape(SHAPES[name], dtypes, device, arguments.repeats)
            for name in arguments.layers
        },
    }
    name = f"kernels_{_short(device)}{'-1-thread' * arguments.busy}.json"
    out = arguments.out or ROOT / "results" / "deploy" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(out)


def _short(device: torch.device) -> str:
    """Name of a device in a file name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"


if __name__ == "__main__":
    main()
