"""Where and with what a run was made."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from autocompress.core.machine import cpu_model, memory_bytes

PACKAGES = (
    "autocompress", "torch", "transformers", "safetensors", "tokenizers", "datasets", "optuna",
    "ray", "numpy", "scikit-learn", "moocore",
)  # fmt: skip
_GIT_SECONDS = 5.0


def collect_provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Command, UTC time, commit, machine and versions, as JSON values.

    Args:
        command: the command line; by default that of this process, by base name.
    """
    arguments = list(sys.argv) if command is None else list(command)
    shown = [_program(arguments[0]), *arguments[1:]] if arguments else []
    return {
        "command": shlex.join(shown),
        "time_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": source_commit(Path(__file__).parent) or "not a git checkout",
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count() or 0,
            "memory_bytes": memory_bytes(),
            "platform": platform.platform(terse=True),
        },
        "versions": {"python": platform.python_version(), **installed_versions(PACKAGES)},
    }


def _program(path: str) -> str:
    """Base name; the package for ``python -m package``, which runs its ``__main__.py``."""
    program = Path(path)
    return program.parent.name if program.name == "__main__.py" else program.name


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Version by package, for those that are installed; imports none of them."""
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def source_commit(directory: Path) -> str | None:
    """Commit of the checkout that holds `directory`, marked if files differ from it.

    None outside a checkout (an installed wheel), without git, or where the checkout does not
    track the directory (a virtual environment inside somebody else's repository).
    """
    if _git(directory, "ls-files", "--error-unmatch", ".") is None:
        return None
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with uncommitted changes" if changed else commit


def _git(directory: Path, *arguments: str) -> str | None:
    """Output of a git command, None if it fails. Takes no lock in the repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
