"""Entry point of the command line: runs a command and turns errors into exit statuses."""

from __future__ import annotations

import os
import sys

# Before torch and ray are imported: spinning OpenMP threads are 5-20 x slower on shared cores,
# and neither library should phone home or chatter.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


def main() -> None:
    """Run the command line and exit: 0 done, 1 the answer is no, 2 bad usage or input."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from autocompress.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
