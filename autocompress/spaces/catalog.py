"""Which space files there are, and reading one by name or path. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from autocompress.core.errors import SpaceError, UnknownNameError, nearest
from autocompress.spaces.messages import read_spec
from autocompress.spaces.schema import SpaceSpec
from autocompress.spaces.source import Source

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class SpaceFile:
    """A space file that was read and found well-formed.

    Attributes:
        spec: its content.
        source: where each value is written, for messages.
    """

    spec: SpaceSpec
    source: Source


def shipped_directory() -> Path:
    """Where the shipped spaces lie: inside an installed package, else `search_spaces/` beside it.

    Raises:
        SpaceError: neither exists, so the installation is incomplete.
    """
    package = Path(str(files("autocompress.spaces")))
    candidates = (package / "shipped", package.parents[1] / "search_spaces")
    for directory in candidates:
        if directory.is_dir() and any(directory.glob("*.yaml")):
            return directory
    raise SpaceError(
        f"The shipped search spaces must lie in {candidates[0]} or {candidates[1]}, but neither "
        "holds a .yaml file. Install the package again, or give the path of a space file."
    )


def available_spaces() -> dict[str, str]:
    """Name to description of every shipped space, sorted by name."""
    return {
        path.stem: read_space_file(path).spec.description
        for path in sorted(shipped_directory().glob("*.yaml"))
    }


def find_space(name_or_path: str) -> SpaceFile:
    """The shipped space of that name, or the file at that path.

    A text with a path separator or a YAML suffix is a path.

    Raises:
        UnknownNameError: there is no such shipped space.
        SpaceError: the file is missing, unreadable, not YAML or not of the schema.
    """
    if name_or_path.endswith(SUFFIXES) or len(Path(name_or_path).parts) > 1:
        return read_space_file(Path(name_or_path).expanduser())
    path = shipped_directory() / f"{name_or_path}.yaml"
    if not name_or_path or not path.is_file():
        raise UnknownNameError(
            f"Unknown search space {name_or_path!r}. {nearest(name_or_path, _shipped_names())} "
            "A file is given by a path that ends in .yaml."
        )
    return read_space_file(path)


def read_space_file(path: Path) -> SpaceFile:
    """Read and validate one file.

    Raises:
        SpaceError: the file is missing, unreadable, not YAML or not of the schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpaceError(
            f"{path}: a space file must be readable, but: {error.strerror}. Give the path of a "
            f".yaml file, or one of: {', '.join(_shipped_names())}."
        ) from error
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path}: a space file is UTF-8 text, but: {error}.") from error
    source = Source.parse(text, path.name)
    if source.data is None:
        raise SpaceError(f"{path}: a space file must not be empty. See search_spaces/README.md.")
    return SpaceFile(read_spec(source), source)


def _shipped_names() -> list[str]:
    return sorted(path.stem for path in shipped_directory().glob("*.yaml"))
