"""What a search space gives on a model."""

from __future__ import annotations

from typing import Any

from autocompress.evaluate import TASKS
from autocompress.export.targets import space_for
from autocompress.models import load_base_model, load_config
from autocompress.workflows.settings import resolve_model
from autocompress.workflows.tasks import task_name_of


def describe_space(
    name: str,
    model: str,
    task: str = "auto",
    target: str = "any",
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """How many layers, choices, options and combinations space `name` gives on `model`.

    Options that cannot run on `target` are left out. Code that ships with the model runs only if
    it may.

    Raises:
        SpaceError: it does not fit the model or the target.
        UnknownNameError: no such space or target.
        ModelError: the model cannot be loaded.
    """
    source = resolve_model(model)
    config = load_config(source, trust_remote_code=trust_remote_code)
    auto_class = TASKS[task_name_of(source, config, task)].auto_class
    base = load_base_model(source, auto_class, trust_remote_code=trust_remote_code)
    return space_for(target, name, base).summary()
