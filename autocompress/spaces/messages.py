"""What pydantic found wrong, in words for the person who wrote the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from autocompress.core.errors import SpaceError, nearest
from autocompress.core.layer import ROLES
from autocompress.spaces.schema import ChoiceSpec, Grid, SpaceSpec, Ties
from autocompress.spaces.source import Source

_SHOWN = 5

_RULES: Mapping[str, str] = {
    "list_type": "must be a list, such as [a, b]",
    "string_type": "must be text, or a mapping where the schema allows one",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}

_Path = tuple[str | int, ...]


def read_spec(source: Source) -> SpaceSpec:
    """Validate a parsed file.

    Raises:
        SpaceError: with one line for each of the first problems: where, the rule, what was got,
            the nearest right answer.
    """
    try:
        return SpaceSpec.model_validate(source.data)
    except ValidationError as error:
        problems = list(_problems(error.errors(include_url=False), source))
    more = f"\n... and {len(problems) - _SHOWN} more." if len(problems) > _SHOWN else ""
    next_step = "\nThe keys are described in search_spaces/README.md."
    raise SpaceError("\n".join(problems[:_SHOWN]) + more + next_step)


def _problems(errors: Iterable[ErrorDetails], source: Source) -> Iterable[str]:
    by_path: dict[tuple[_Path, str], list[ErrorDetails]] = {}
    for error in errors:
        missing = str(error["loc"][-1]) if error["type"] == "missing" else ""
        by_path.setdefault((_path(error["loc"], source.data), missing), []).append(error)
    for (path, _), found in by_path.items():
        yield f"{source.at(path)}: {_explain(path, found)}"


def _path(location: _Path, data: Any) -> _Path:
    """The part of an error's location that exists in the file: union tags fall away."""
    path: list[str | int] = []
    for part in location:
        in_mapping = isinstance(data, dict) and part in data
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_mapping or in_list:
            path.append(part)
            data = data[part]
    return tuple(path)


def _explain(path: _Path, found: list[ErrorDetails]) -> str:
    error = found[0]
    kind, got = error["type"], error["input"]
    if len(found) > 1:  # every branch of a union failed: only a method's options are a plain union
        return f"an option is a value or a list of values, but got {_show(got)}."
    if kind == "extra_forbidden":
        key = str(path[-1])
        return f"unknown key {key!r}. {nearest(key, _model_at(path[:-1]).model_fields)}"
    if kind == "missing":
        key = str(error["loc"][-1])
        return f"the key {key!r} is required. {_HINTS.get(key, '')}".strip()
    if kind == "literal_error":
        return _not_one_of(path, got)
    if kind == "value_error":
        return f"{error['ctx']['error']}."
    rule = _RULES.get(kind) or error["msg"]
    return f"{rule}, but got {_show(got)}."


_HINTS: Mapping[str, str] = {
    "schema_version": "Write schema_version: 1.",
    "method": "Name a method of `autocompress methods`.",
    "options": "List at least one, for example options: [base, rtn(bits=8)].",
    "description": "Write one line for people.",
}


def _not_one_of(path: _Path, got: object) -> str:
    if "roles" in path:
        return f"unknown role {_show(got)}. {nearest(str(got), ROLES)}"
    return f"this version reads schema_version 1, but got {_show(got)}."


def _model_at(path: _Path) -> type[BaseModel]:
    """The model whose keys belong at `path`: depth tells them apart."""
    if path[:1] == ("ties",):
        return Ties
    if len(path) >= 4 and path[2] == "options":
        return Grid
    return ChoiceSpec if len(path) == 2 else SpaceSpec


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
