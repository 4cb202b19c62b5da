"""Checkpoints: written packed or dense, loaded again, verified in a fresh process.

The package itself imports nothing: `autocompress` installs the transformers hook from here, and
must stay cheap. Names load when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress.export.dense import write_dense
    from autocompress.export.loading import load
    from autocompress.export.manifest import Manifest, is_export, stored_bytes
    from autocompress.export.packed import write_packed
    from autocompress.export.plan import FORMAT_VERSION
    from autocompress.export.verify import run_fresh_process

_MODULES = {
    "FORMAT_VERSION": "plan",
    "Manifest": "manifest",
    "is_export": "manifest",
    "load": "loading",
    "run_fresh_process": "verify",
    "stored_bytes": "manifest",
    "write_dense": "dense",
    "write_packed": "packed",
}

__all__ = [
    "FORMAT_VERSION",
    "Manifest",
    "is_export",
    "load",
    "run_fresh_process",
    "stored_bytes",
    "write_dense",
    "write_packed",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
