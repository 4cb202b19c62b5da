"""Measured seconds by kernel, layer and number of tokens: one file per device, filled as needed.

The file lies in the user's cache (`AUTOCOMPRESS_CACHE`, else ``$XDG_CACHE_HOME/autocompress``, else
``~/.cache/autocompress``) and belongs to one processor, number of threads and version of torch, and
to the code of the kernels: times of other code are measured again. Deleting it costs nothing but
the measurements.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from autocompress.core.digest import digest
from autocompress.core.files import write_atomically
from autocompress.core.machine import cache_directory, cpu_model
from autocompress.kernels.code import code_digest

_logger = logging.getLogger(__name__)
_VERSION = 1


def device_name(device: torch.device) -> str:
    """Processor, instruction set, threads (or GPU) and torch: what a table belongs to."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        processor = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    else:
        isa = torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
        processor = f"{cpu_model()}, {isa}, {threads} thread{'s' * (threads > 1)}"
    return f"{processor}, torch {torch.__version__}"


class Table:
    """Seconds of one device: in memory, and in a file that survives.

    A file that cannot be read or written is a warning: the table is then measured again.

    Args:
        device: what `device_name` says.
        code: digest of the code that is timed; times of other code are not read.
        path: the file; need not exist.
    """

    def __init__(self, device: str, code: str, path: Path) -> None:
        self.path = path
        self._about = {"version": _VERSION, "device": device, "code": code}
        self._seconds = _read(path, self._about)

    def get(self, key: str) -> Mapping[str, float] | None:
        """Seconds by kernel under `key`; None if it was not measured."""
        return self._seconds.get(key)

    def put(self, key: str, seconds: Mapping[str, float]) -> None:
        """Add an entry, and write the file with what other processes added meanwhile."""
        self._seconds = _read(self.path, self._about) | self._seconds
        self._seconds[key] = {**self._seconds.get(key, {}), **seconds}
        content = {**self._about, "seconds": self._seconds}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(content, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            _logger.warning("Kernel timings are not kept: %s", error)


def table_of(device: torch.device) -> Table:
    """The table of a device in this process."""
    return _table(device_name(device), code_digest(), cache_directory())


@lru_cache(maxsize=16)
def _table(device: str, code: str, directory: Path) -> Table:
    short = re.sub(r"[^A-Za-z0-9]+", "-", device)[:40].strip("-").lower()
    return Table(device, code, directory / "kernels" / f"{short}-{digest(device)[:12]}.json")


def _read(path: Path, about: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """Entries of a file; none if there is none, it is about something else, or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if any(content.get(name) != value for name, value in about.items()):
            return {}
        return {
            str(key): {str(kernel): float(value) for kernel, value in entry.items()}
            for key, entry in content["seconds"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.warning("Kernel timings in %s are not used: %s", path, error)
        return {}
