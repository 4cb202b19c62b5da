"""Device profiles as files: what `autocompress device` measured. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autocompress.core.errors import UsageError
from autocompress.cost.latency import LatencyTable
from autocompress.cost.profiles import PROFILES, DeviceProfile

SCHEMA_VERSION = 2
_READABLE = (1, 2)  # the first had no latency table
_SUFFIX = ".json"


def find_profile(name: str) -> DeviceProfile:
    """A profile that ships, by its name, or one in a file, by its path (``*.json``).

    Raises:
        UnknownNameError: neither ships under that name nor ends in ``.json``.
        UsageError: the file is missing, or no device profile.
    """
    return read_profile(Path(name)) if name.endswith(_SUFFIX) else PROFILES[name]


def require_profile_path(path: Path) -> None:
    """Refuse a path that no profile can be written to, before anything is measured.

    Raises:
        UsageError: the name of the file does not end in ``.json``.
    """
    if path.suffix != _SUFFIX:
        raise UsageError(
            f"A device profile is a {_SUFFIX} file, but got {path}. "
            f"Next step: --out {path}{_SUFFIX}."
        )


def profile_document(profile: DeviceProfile) -> dict[str, Any]:
    """What a file holds of a profile; `read_profile` reads it back."""
    return {"schema_version": SCHEMA_VERSION, **profile.to_json()}


def write_profile(profile: DeviceProfile, path: Path) -> None:
    """Write a profile as JSON.

    Raises:
        UsageError: the name of the file does not end in ``.json``, or it cannot be written.
    """
    require_profile_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(profile_document(profile), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"The device profile cannot be written to {path}: {error.strerror}. "
            "Next step: give --out a place that can be written."
        ) from error


def read_profile(path: Path) -> DeviceProfile:
    """The profile that a file holds.

    Raises:
        UsageError: there is no such file, or it is no device profile of a version known here.
    """
    again = "Next step: measure this machine with `autocompress device --out FILE.json`."
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a device profile: {error}. {again}") from error
    if not isinstance(document, dict) or document.get("schema_version") not in _READABLE:
        raise UsageError(
            f"{path} must be a device profile of schema_version 1 or {SCHEMA_VERSION}, but is not. "
            f"{again}"
        )
    return _profile(path, {n: v for n, v in document.items() if n != "schema_version"}, again)


def _profile(path: Path, fields: dict[str, Any], again: str) -> DeviceProfile:
    table = fields.get("latency")
    try:
        latency = None if table is None else LatencyTable.from_json(table)
        return DeviceProfile(**{**fields, "latency": latency})
    except UsageError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} does not hold the fields of a profile: {error}. {again}"
        ) from error
