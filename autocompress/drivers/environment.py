"""Environment variables that must be set before torch and Ray are first imported."""

from __future__ import annotations

import os
import sys
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
    variables = {
        **WORKER_VARIABLES,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
    }
    # This process reads the mode when it imports Ray, the servers that it starts read it later:
    # who has imported Ray already keeps the mode that it was imported with.
    if "ray" not in sys.modules:
        # Token authentication keeps its token in the home directory.
        home_is_writable = os.access(Path.home(), os.W_OK)
        variables["RAY_AUTH_MODE"] = "token" if home_is_writable else "disabled"
    for name, value in variables.items():
        os.environ.setdefault(name, value)
