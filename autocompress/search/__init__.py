"""The search: ask for an allocation, measure it, tell; journal, budget and resume.

Names are imported when they are first used: who reads a journal does not wait for torch or Optuna.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autocompress.search.budget import Budget, Spent
    from autocompress.search.context import TrialContext
    from autocompress.search.driver import Driver
    from autocompress.search.journal import Journal, read_journal
    from autocompress.search.mirror import Mirror
    from autocompress.search.racing import DEFAULT_RACING, Racing
    from autocompress.search.run_trial import run_trial
    from autocompress.search.sampler import Sampler
    from autocompress.search.samplers import SAMPLERS
    from autocompress.search.shipping import ContextParts, pack_context
    from autocompress.search.study import Progress, Study

__all__ = [
    "DEFAULT_RACING",
    "SAMPLERS",
    "Budget",
    "ContextParts",
    "Driver",
    "Journal",
    "Mirror",
    "Progress",
    "Racing",
    "Sampler",
    "Spent",
    "Study",
    "TrialContext",
    "pack_context",
    "read_journal",
    "run_trial",
]

_MODULES = {
    "DEFAULT_RACING": "racing",
    "SAMPLERS": "samplers",
    "Budget": "budget",
    "ContextParts": "shipping",
    "Driver": "driver",
    "Journal": "journal",
    "Mirror": "mirror",
    "Progress": "study",
    "Racing": "racing",
    "Sampler": "sampler",
    "Spent": "budget",
    "Study": "study",
    "TrialContext": "context",
    "pack_context": "shipping",
    "read_journal": "journal",
    "run_trial": "run_trial",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
