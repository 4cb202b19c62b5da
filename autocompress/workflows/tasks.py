"""The task that a model is searched for, and how its outputs are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autocompress.core.errors import UsageError
from autocompress.evaluate import TASKS, Task, detect_task
from autocompress.evaluate.pooling import MEAN
from autocompress.models.pipeline import has_pipeline, read_pooling


def task_name_of(source: str, config: object, asked: str) -> str:
    """The name of a task, or what ``auto`` stands for on a model.

    Raises:
        UsageError: ``auto``, and the architecture is none that a task is for.
    """
    if asked != "auto":
        return asked
    return detect_task(config, has_pipeline=has_pipeline(source))


def task_on(source: str, config: object, asked: str) -> Task:
    """The task, pooling embeddings as the model's own pipeline does.

    Args:
        source: folder or hub id.
        config: of the model.
        asked: name of a task, or ``auto``.

    Raises:
        UsageError: see `task_name_of`.
        UnknownNameError: no such task.
        ModelError: the pipeline is damaged, or its pooling is not built here.
    """
    task = TASKS[task_name_of(source, config, asked)]
    return task.with_pooling(read_pooling(source)) if "pooling" in task.details else task


def recorded_details(record: Mapping[str, Any]) -> dict[str, str]:
    """Details of the task as a run or an export recorded them.

    Versions that did not record the pooling pooled by the mean, whatever the model's pipeline said.
    """
    return {"pooling": str(record.get("pooling", MEAN))}


def require_same_details(task: Task, record: Mapping[str, Any], model: str) -> None:
    """Refuse to go on with what was measured in another way than the task now measures.

    Args:
        task: of the model as it is now.
        record: what a run resolved.
        model: its name, for the message.

    Raises:
        UsageError: which detail differs.
    """
    for name, was in recorded_details(record).items():
        now = task.details.get(name, was)
        if now != was:
            raise UsageError(
                f"The run was measured with {name} {was!r}, but the pipeline of {model} says "
                f"{now!r}. Next step: search again into a new --out directory, or restore the "
                "model if it was changed."
            )


def in_words(task: Task) -> str:
    """Name and details of a task: ``feature-extraction (pooling: cls)``."""
    details = ", ".join(f"{name}: {value}" for name, value in task.details.items())
    return f"{task.name} ({details})" if details else task.name
