"""The compression methods as rows for a table."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

from autocompress.methods import METHODS


def describe_methods() -> list[dict[str, Any]]:
    """One row per registered method: name, kind, needs, summary and default options."""
    return [_row(name) for name in METHODS]


def describe_method(name: str) -> dict[str, Any]:
    """The row of a method, with what its file and its options' docstrings say.

    Raises:
        UnknownNameError: no method is registered under `name`.
    """
    method = METHODS[name]
    module = sys.modules[type(method).__module__]
    return {
        **_row(name),
        "about": inspect.getdoc(module) or "",
        "meaning_of_options": inspect.getdoc(method.options) or "",
    }


def _row(name: str) -> dict[str, Any]:
    method = METHODS[name]
    return {
        "name": name,
        "kind": method.kind.name.lower(),
        "needs": method.needs.name.lower(),
        "summary": method.summary,
        "options": dataclasses.asdict(method.options()),
    }
