"""What a fresh process does to verify an export: load it, measure it, answer in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autocompress.workflows.evaluate import evaluate_model


def answer(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the export at ``payload["checkpoint"]`` as its own manifest says.

    Its code, if it has any, runs if ``payload["trust_remote_code"]`` says so.
    """
    evaluation = evaluate_model(
        payload["checkpoint"], trust_remote_code=payload["trust_remote_code"]
    )
    return {
        "quality": evaluation.quality.to_json(),
        "storage_bytes": evaluation.storage_bytes,
    }
