"""What a search space gives on a model."""

from __future__ import annotations

from typing import Any

from autocompress.evaluate import TASKS, detect_task
from autocompress.models import load_base_model, load_config
from autocompress.spaces import load_space
from autocompress.workflows.settings import resolve_model


def describe_space(name: str, model: str, task: str = "auto") -> dict[str, Any]:
    """How many layers, choices, options and combinations space `name` gives on `model`.

    Raises:
        SpaceError: no such space, or it does not fit the model.
        ModelError: the model cannot be loaded.
    """
    source = resolve_model(model)
    task_name = detect_task(load_config(source), source) if task == "auto" else task
    layout = load_base_model(source, TASKS[task_name].auto_class).layout
    return load_space(name, layout.layers).summary()
