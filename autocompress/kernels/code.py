"""Which code was timed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from autocompress import methods, native
from autocompress.core.digest import digest, digest_bytes


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Of the source of all kernels, and of the methods whose codes they decode."""
    folders = [Path(file).parent for file in (__file__, methods.__file__, native.__file__)]
    files = [f for folder in folders for f in folder.iterdir() if f.suffix in (".py", ".c", ".h")]
    return digest([digest_bytes(path.read_bytes()) for path in sorted(files)])
