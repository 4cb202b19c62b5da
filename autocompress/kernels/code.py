"""Which code was timed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from autocompress import methods, native
from autocompress.core.digest import digest, digest_bytes


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Of the source of all kernels, and of the methods whose codes they decode."""
    own, decoders, compiled = (
        Path(__file__).parent,
        Path(methods.__file__).parent,
        Path(native.__file__).parent,
    )
    files = [*own.glob("*.py"), *decoders.glob("*.py")]
    files += [path for path in compiled.iterdir() if path.suffix in (".py", ".c", ".h")]
    return digest([digest_bytes(path.read_bytes()) for path in sorted(files)])
