"""Teach transformers the packed format without importing it.

Transformers has no entry point for quantizers. If it is imported before this package, the
quantizer registers at once; otherwise a finder waits for the one module that holds the registry,
lets it load as usual, registers right after, and removes itself. Standard library only: this runs
on every ``import autocompress``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRY_MODULE = "transformers.quantizers.auto"

_QUANTIZER_MODULE = "autocompress.export.quantizer"
_logger = logging.getLogger(__name__)


def install() -> None:
    """Register the packed format with transformers, now or when it loads. Safe to call again."""
    if REGISTRY_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


class _RegistryFinder(MetaPathFinder):
    """Finds the registry module as the path finder does, and registers once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]  # this spec only
        return spec


def _register() -> None:
    try:
        import_module(_QUANTIZER_MODULE)
    except ImportError as error:
        # A transformers whose quantizer interface moved must still import for its other users.
        _logger.warning("Packed checkpoints cannot be loaded with this transformers: %s", error)
