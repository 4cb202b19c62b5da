"""Compile the C kernels for this processor, once, and load them.

The compiler is that of ``$CC``, else ``cc``, ``gcc`` or ``clang``. What it makes lies in the user's
cache under a name that says source, flags, compiler and processor. `AUTOCOMPRESS_NATIVE=0` keeps
it from running; without a compiler the kernels refuse, and others run.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from autocompress.core.digest import digest
from autocompress.core.machine import cache_directory, cpu_model

_logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
SOURCES = tuple(_FOLDER / f"{name}.c" for name in ("grid", "panels", "rotation", "trellis"))
_READ = (_FOLDER / "grid.h", *SOURCES)
SWITCH = "AUTOCOMPRESS_NATIVE"
_COMPILERS = ("cc", "gcc", "clang")
_COMMON = ("-O3", "-std=c11", "-shared", "-fPIC")
FLAGS: tuple[tuple[str, ...], ...] = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-fopenmp",),
    (),
)
"""Tried in this order: not every compiler knows every processor, or OpenMP."""
_SECONDS = 120

_POINTER, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_GRID = (_POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _INT)
_PRODUCT = (*_GRID, _POINTER, _COUNT, _POINTER, _INT)
_ARGUMENTS = {
    "grid_product": _PRODUCT,
    "grid_values": (*_GRID, _COUNT, _COUNT, _POINTER, _INT),
    "rotation": (_POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _COUNT, _POINTER, _INT),
    "trellis_states": (
        *(_POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _INT, _INT, _POINTER, _INT),
    ),
}
_PANELS = "grid_panels"  # compiled for processors with AVX-512 BF16 only


class NativeError(Exception):
    """There are no C kernels here; the text says why."""


def missing() -> str:
    """Why the C kernels cannot run here; empty if they can. Compiles them if need be."""
    found = _here()
    return found if isinstance(found, str) else ""


def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        NativeError: there are none.
    """
    found = _here()
    if isinstance(found, str):
        raise NativeError(found)
    return found


def _here() -> ctypes.CDLL | str:
    return _found(os.environ.get(SWITCH, "1"), os.environ.get("CC", ""), cache_directory())


@lru_cache(maxsize=8)
def _found(switch: str, named: str, cache: Path) -> ctypes.CDLL | str:
    if switch == "0":
        return f"{SWITCH} is 0"
    compiler = next(filter(None, map(shutil.which, (named,) if named else _COMPILERS)), None)
    if compiler is None:
        return f"there is no C compiler ({named or ', '.join(_COMPILERS)})"
    try:
        path = kept(compiler, cache / "native")
        try:
            return load(path)
        except NativeError:  # damaged: made again
            path.unlink(missing_ok=True)
            return load(kept(compiler, cache / "native"))
    except (NativeError, OSError) as error:
        _logger.warning("The C kernels are not used: %s", error)
        return str(error)


def kept(compiler: str, folder: Path) -> Path:
    """The compiled kernels in `folder`, made if they are not there.

    Raises:
        NativeError: they cannot be compiled, or kept.
    """
    isa = torch.backends.cpu.get_cpu_capability()
    about = [*(path.read_text("utf-8") for path in _READ), FLAGS, compiler, _version(compiler)]
    path = folder / f"{digest([*about, cpu_model(), isa, platform.platform()])}.so"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                made = compiled(compiler, Path(temporary))
                os.replace(made, path)  # noqa: PTH105 - whole or not at all
        except OSError as error:
            raise NativeError(f"they cannot be kept in {folder}: {error}") from error
    return path


def compiled(
    compiler: str, folder: Path, flags: Sequence[Sequence[str]] = FLAGS, *more: str
) -> Path:
    """The kernels, compiled into `folder` with the first of `flags` that the compiler takes.

    Raises:
        NativeError: it takes none.
    """
    out, said = folder / "grid.so", ""
    for some in flags:
        command = [compiler, *_COMMON, *some, *more, *map(str, SOURCES), "-o", str(out)]
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            said = said or str(error)
            continue
        if ended.returncode == 0:
            return out
        said = said or ended.stderr.strip()
    names = ", ".join(path.name for path in SOURCES)
    raise NativeError(f"{compiler} does not compile {names}: {said[-500:]}")


def load(path: Path) -> ctypes.CDLL:
    """Load compiled kernels and declare what they take.

    Raises:
        NativeError: the file is none of this processor's.
    """
    try:
        found = ctypes.CDLL(str(path))
        for name, arguments in _ARGUMENTS.items():
            getattr(found, name).argtypes = arguments
        if has_panels(found):
            getattr(found, _PANELS).argtypes = _PRODUCT
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path} cannot be loaded: {error}") from error
    return found


def has_panels(functions: ctypes.CDLL) -> bool:
    """True if the products of many tokens in bfloat16 were compiled."""
    return hasattr(functions, _PANELS)


def _version(compiler: str) -> str:
    try:
        ended = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{compiler} does not run: {error}") from error
    return ended.stdout
