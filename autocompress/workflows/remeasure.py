"""What a fresh process does to verify an export: load it, measure it, answer in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autocompress.workflows.evaluate import evaluate_model


def answer(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the export at ``payload["checkpoint"]`` as its own manifest says."""
    evaluation = evaluate_model(payload["checkpoint"])
    return {
        "quality": evaluation.quality.to_json(),
        "storage_bytes": evaluation.storage_bytes,
    }
