"""YAML with positions: where in the file a value was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from autocompress.core.errors import SpaceError

Path = Sequence[str | int]
"""Keys and list indices from the top of the file to a value."""


@dataclass(frozen=True)
class Source:
    """A parsed YAML document that remembers its lines.

    Attributes:
        name: of the file, for messages.
        data: plain Python values.
        root: the node tree, for `at`.
    """

    name: str
    data: Any
    root: yaml.Node | None

    @classmethod
    def parse(cls, text: str, name: str) -> Source:
        """Read YAML text.

        Raises:
            SpaceError: the text is not YAML (with line and column), or writes a key twice.
        """
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            _refuse_repeated_keys(root, name)
            data = None if root is None else loader.construct_document(root)
        except yaml.MarkedYAMLError as error:
            raise SpaceError(_syntax_message(error, name)) from error
        except yaml.YAMLError as error:  # a character that YAML forbids
            raise SpaceError(f"{name}: a space file is YAML text, but: {error}") from error
        return cls(name, data, root)

    def at(self, path: Path) -> str:
        """``joint.yaml:12: choices[1].roles[0]``; the line is that of the nearest value there."""
        node = self.root
        for key in path:
            found = _child(node, key)
            if found is None:
                break
            node = found
        line = f":{node.start_mark.line + 1}" if node is not None else ""
        return ": ".join(filter(None, (f"{self.name}{line}", _dotted(path))))


def _dotted(path: Path) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def _child(node: yaml.Node | None, key: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        item: yaml.Node = node.value[key]
        return item
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == key:
                child: yaml.Node = value
                return child
    return None


def _refuse_repeated_keys(node: yaml.Node | None, name: str) -> None:
    """YAML itself keeps the last of two equal keys, silently."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, name)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise SpaceError(
                    f"{name}:{line}: a key is written once, but {key.value!r} is also on line "
                    f"{seen[key.value]}. Remove one of them."
                )
            seen[key.value] = line
            _refuse_repeated_keys(value, name)


def _syntax_message(error: yaml.MarkedYAMLError, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    detail = ", ".join(filter(None, (error.context, error.problem)))
    return (
        f"{where}: a space file is YAML, but line {mark.line + 1 if mark else '?'}, column "
        f"{mark.column + 1 if mark else '?'} cannot be read: {detail}. Check indentation, "
        "brackets and quotes there."
    )
