"""Which code compressed an entry."""

from __future__ import annotations

import inspect
from functools import lru_cache
from pathlib import Path

from autocompress import methods
from autocompress.core import Scheme, digest, digest_bytes
from autocompress.methods import METHODS


@lru_cache(maxsize=4096)
def code_digest(scheme: Scheme) -> str:
    """Of the source of all methods: an entry that older code wrote is never taken for a new one."""
    own = Path(methods.__file__).parent.glob("*.py")
    used = (Path(inspect.getfile(type(METHODS[stage.method]))) for stage in scheme.stages)
    return digest([_file_digest(path) for path in sorted({*own, *used})])


@lru_cache(maxsize=256)
def _file_digest(path: Path) -> str:
    return digest_bytes(path.read_bytes())
