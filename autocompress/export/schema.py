"""Validation of the JSON that a checkpoint brings: untrusted until it fits the schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

from jsonschema import Draft202012Validator

from autocompress.core.errors import CheckpointError

Document = Literal["quantization_config", "manifest"]


def validate(data: object, document: Document, where: str) -> None:
    """Make sure that `data` fits the schema of `document`.

    Raises:
        CheckpointError: it does not; names the place in the file and the rule.
    """
    error = next(iter(_validator(document).iter_errors(data)), None)
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "the top level"
        raise CheckpointError(
            f"{where} is not valid at {place}: {error.message[:300]}. Next step: export the "
            "checkpoint again; it may have been edited or damaged."
        )


def require_version(data: object, key: str, supported: int, where: str) -> None:
    """Refuse a newer format before its unknown fields are called damage.

    Raises:
        CheckpointError: `data[key]` is an integer above `supported`.
    """
    found = data.get(key) if isinstance(data, Mapping) else None
    if isinstance(found, int) and found > supported:
        raise CheckpointError(
            f"{where} is of format version {found}, but this autocompress reads up to "
            f"{supported}. Next step: pip install --upgrade autocompress."
        )


@lru_cache(maxsize=2)
def _validator(document: Document) -> Draft202012Validator:
    text = files("autocompress.export").joinpath("format.schema.json").read_text("utf-8")
    definitions: dict[str, Any] = json.loads(text)
    return Draft202012Validator({**definitions, "$ref": f"#/$defs/{document}"})
