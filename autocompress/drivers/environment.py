"""Environment variables that must be set before torch and Ray are first imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

WORKER_VARIABLES: Mapping[str, str] = {
    # Threads that spin while they wait make trials on shared cores 5 to 20 times slower.
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def prepare() -> None:
    """Set what the user has not set: quiet libraries, no telemetry, Ray's token auth."""
    # Token authentication keeps its token in the home directory.
    home_is_writable = os.access(Path.home(), os.W_OK)
    variables = {
        **WORKER_VARIABLES,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token" if home_is_writable else "disabled",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)
