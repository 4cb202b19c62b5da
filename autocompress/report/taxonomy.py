"""The taxonomy of the field as tables for terminals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_WHY_NONE = {"here": "", "planned": "planned: ", "out_of_scope": "out of scope: "}
_WIDTHS = (24, 30, 22)  # 80 columns with their gaps


def taxonomy_table(taxonomy: Mapping[str, Any]) -> RenderableType:
    """A table for each family: leaves, methods in bold or why there are none, published names.

    Args:
        taxonomy: ``leaves``, each with ``family``, ``leaf``, ``published``, ``methods``, ``here``,
            ``planned`` and ``out_of_scope``; and ``plugins``, each with ``name`` and ``package``.
    """
    leaves = taxonomy["leaves"]
    families = groupby(leaves, key=lambda leaf: leaf["family"])
    tables = [_family_table(family, members) for family, members in families]
    return Group(*tables, *_plugins(taxonomy["plugins"]), Text(_summary(leaves), style="dim"))


def _family_table(family: str, leaves: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.title, table.title_justify, table.title_style = f"\n{family}", "left", "bold underline"
    for width in _WIDTHS:
        table.add_column(width=width, overflow="fold")
    for leaf in leaves:
        table.add_row(
            Text(leaf["leaf"]), _standing(leaf), Text(", ".join(leaf["published"]), "dim")
        )
    return table


def _standing(leaf: Mapping[str, Any]) -> Text:
    """The methods of a leaf, then what else is to be said of it."""
    parts = [Text(", ".join(leaf["methods"]), "bold")] if leaf["methods"] else []
    for name, prefix in _WHY_NONE.items():
        if leaf[name]:
            parts.append(Text(prefix + leaf[name], "" if name == "here" else "dim"))
    return Text("; ").join(parts)


def _plugins(plugins: Sequence[Mapping[str, str]]) -> list[Text]:
    if not plugins:
        return []
    names = ", ".join(f"{point['name']} ({point['package']})" for point in plugins)
    return [Text(f"\nMethods of other packages: {names}")]


def _summary(leaves: Sequence[Mapping[str, Any]]) -> str:
    n_methods = sum(len(leaf["methods"]) for leaf in leaves)
    done = sum(bool(leaf["methods"] or leaf["here"]) for leaf in leaves)
    return (
        f"\n{n_methods} methods; {done} of {len(leaves)} leaves are here. `autocompress methods "
        "list` says what each method needs, `autocompress methods show NAME` its options."
    )
