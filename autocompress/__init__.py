"""Automated compression search for Hugging Face transformers.

Importing this package is cheap: torch, transformers, ray and optuna load when a verb needs them.
It also teaches transformers to read packed checkpoints, so that after ``import autocompress``
``AutoModelFor….from_pretrained(path)`` loads an exported member.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version as _version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autocompress.export.hook import install as _install_hook

if TYPE_CHECKING:
    from autocompress.export.loading import load
    from autocompress.fronts.document import FrontDocument
    from autocompress.objectives import CostEfficiency, Exponents, cost_efficiency
    from autocompress.workflows.evaluate import evaluate_model as evaluate
    from autocompress.workflows.gate import judge_target as gate
    from autocompress.workflows.profile import profile
    from autocompress.workflows.run import Run, load_run
    from autocompress.workflows.search import search
    from autocompress.workflows.solve import solve_run as solve

__version__ = _version("autocompress")

_VERBS = {
    "search": ("autocompress.workflows.search", "search"),
    "load_run": ("autocompress.workflows.run", "load_run"),
    "Run": ("autocompress.workflows.run", "Run"),
    "profile": ("autocompress.workflows.profile", "profile"),
    "solve": ("autocompress.workflows.solve", "solve_run"),
    "load": ("autocompress.export.loading", "load"),
    "evaluate": ("autocompress.workflows.evaluate", "evaluate_model"),
    "gate": ("autocompress.workflows.gate", "judge_target"),
    "cost_efficiency": ("autocompress.objectives", "cost_efficiency"),
    "CostEfficiency": ("autocompress.objectives", "CostEfficiency"),
    "Exponents": ("autocompress.objectives", "Exponents"),
    "FrontDocument": ("autocompress.fronts.document", "FrontDocument"),
}

__all__ = [
    "CostEfficiency",
    "Exponents",
    "FrontDocument",
    "Run",
    "__version__",
    "cost_efficiency",
    "evaluate",
    "gate",
    "load",
    "load_run",
    "profile",
    "search",
    "solve",
]

_install_hook()


def __getattr__(name: str) -> Any:
    """Import a verb when it is first asked for."""
    if name not in _VERBS:
        raise AttributeError(f"module 'autocompress' has no attribute {name!r}")
    module, attribute = _VERBS[name]
    return getattr(import_module(module), attribute)


class _Named(ModuleType):
    """A subpackage that is called like a verb, ``search`` or ``evaluate``, and can be called so."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return __getattr__(self.__name__.rpartition(".")[2])(*arguments, **named)


class _Package(ModuleType):
    """This package: importing a subpackage binds its name here, over that of the verb."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _Named
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
