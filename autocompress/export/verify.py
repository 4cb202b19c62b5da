"""Ask a fresh Python process: what an export is worth is what others get who load it.

The process imports a module by name and calls its ``answer(request)``, a function from a JSON
object to a JSON object. What is measured is the business of that module; it can live in a higher
layer. The answer travels through a file, so that libraries may print what they like.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from autocompress.core import errors
from autocompress.core.errors import AutocompressError, NoAnswerError

_TAIL = 2000  # characters of the child's stderr that go into an error message


def run_fresh_process(
    module: str, request: Mapping[str, Any], *, timeout_seconds: float | None = None
) -> dict[str, Any]:
    """Run ``module.answer(request)`` in a new process of this Python.

    Args:
        module: dotted name of a module with a function ``answer``.
        request: JSON object.
        timeout_seconds: how long the process may take; None for ever.

    Returns:
        The JSON object that ``answer`` returned.

    Raises:
        AutocompressError: of the class and with the message that ``answer`` raised.
        NoAnswerError: the process died, took too long, or failed in an unexpected way.
    """
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        reply = Path(folder) / "answer.json"
        command = [sys.executable, "-P", "-m", __name__, module, str(reply)]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request),
                env=_environment(),
                text=True,
                capture_output=True,
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise NoAnswerError(
                f"The fresh process of {module} gave no answer within {timeout_seconds} seconds."
            ) from error
        if done.returncode != 0 or not reply.is_file():
            raise NoAnswerError(
                f"The fresh process of {module} ended with status {done.returncode} and no "
                f"answer:\n{done.stderr[-_TAIL:]}"
            )
        outcome = json.loads(reply.read_text("utf-8"))
    if "error" in outcome:
        raise _error_class(outcome["error"]["class"])(outcome["error"]["message"])
    return dict(outcome["answer"])


def _environment() -> dict[str, str]:
    """Ours, with our import path: the child must see the modules that we see."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path}


def _error_class(name: str) -> type[AutocompressError]:
    found = getattr(errors, name, None)
    if isinstance(found, type) and issubclass(found, AutocompressError):
        return found
    return AutocompressError


def _serve(module: str, reply: Path) -> None:
    """In the fresh process: read the request from stdin, write the outcome to `reply`."""
    request = json.load(sys.stdin)
    outcome: dict[str, Any]
    try:
        outcome = {"answer": import_module(module).answer(request)}
    except AutocompressError as error:
        outcome = {"error": {"class": type(error).__name__, "message": str(error)}}
    reply.write_text(json.dumps(outcome, allow_nan=True), "utf-8")


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
