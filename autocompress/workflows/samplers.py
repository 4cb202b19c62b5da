"""The samplers as rows for a table."""

from __future__ import annotations

from typing import Any

from autocompress.search import SAMPLERS


def describe_samplers() -> list[dict[str, Any]]:
    """One row per registered sampler: name, what it uses, summary."""
    return [
        {
            "name": name,
            "adaptive": SAMPLERS[name].adaptive,
            "needs_table": SAMPLERS[name].needs_table,
            "needs_training": SAMPLERS[name].needs_training,
            "summary": SAMPLERS[name].summary,
        }
        for name in SAMPLERS
    ]
