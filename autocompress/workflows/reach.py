"""What calibration tokens reach: which layers read one tensor, which experts they are sent to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from autocompress.core import digest
from autocompress.core.files import write_atomically
from autocompress.evaluate import Split, Task
from autocompress.models.loading import BaseModel
from autocompress.models.reads import as_read, reads_of
from autocompress.models.routing import count_routed

if TYPE_CHECKING:
    from autocompress.workflows.session import Session

CALIBRATION_BATCH = 8


def described_as_read(base: BaseModel, task: Task, calibration: Split) -> BaseModel:
    """The model with a layout whose layers share inputs as they do on the longest sequence.

    The same in every process that opens the same model and tokens.
    """
    batch = task.batches(calibration, 1)[0]
    reads = reads_of(base.module, base.layout, batch)
    return replace(base, layout=as_read(base.layout, reads))


def routed_tokens(session: Session) -> Mapping[str, int]:
    """Calibration tokens that are sent to each layer of an expert, counted once."""
    base, split = session.base, session.splits.calibration
    if not any(layer.expert is not None for layer in base.layout.layers):
        return {}
    key = digest(["routing", 1, base.digest, split.digest])
    path = session.cache / "routing" / f"{key}.json"
    with suppress(OSError, ValueError):  # absent or damaged: counted again
        return cast(dict[str, int], json.loads(path.read_text("utf-8")))
    session.progress.step(f"Counting which experts {split.n_tokens:,} tokens are sent to")
    batches = session.task.batches(split, CALIBRATION_BATCH)
    counts = count_routed(base.module, base.layout, batches)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(counts))
    return counts
