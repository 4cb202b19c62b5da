"""A directory that appears complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from autocompress.core.errors import AutocompressError, RunDirectoryError


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Give a temporary sibling of `out` to write into; it becomes `out` if the block succeeds.

    Raises:
        RunDirectoryError: `out` exists and is not an empty directory, or cannot be written, or
            the disk is full. Nothing is left behind then.
    """
    require_free(out)
    temporary = out.parent / f".{out.name}.{uuid4().hex[:8]}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _open_to_readers(temporary)
        temporary.replace(out)
    except AutocompressError:
        raise
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(
            f"{out} cannot be written: {_reason(error)}. Nothing was left there. Next step: free "
            "space or permissions, or choose another --out."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_to_readers(directory: Path) -> None:
    """Give files the permissions of the directory: safetensors makes them private."""
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def require_free(out: Path) -> None:
    """Raise `RunDirectoryError` unless `out` does not exist or is an empty directory."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise RunDirectoryError(
            f"An export is written to a new or empty directory, but {out} already holds "
            f"{'files' if out.is_dir() else 'a file'}. Next step: choose another --out."
        )


def _reason(error: OSError | SafetensorError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
