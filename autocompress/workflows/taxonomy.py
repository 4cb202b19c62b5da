"""The field's taxonomy: each leaf with the methods here, or why there are none.

The data is `autocompress/methods/taxonomy.yaml`. Reading it imports no method, so that listing
answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class Leaf:
    """One kind of compression.

    Attributes:
        family: what it is a kind of.
        leaf: its name, unique.
        published: systems and papers that it stands for.
        methods: names of the methods here, as schemes spell them.
        here: how this package does it otherwise; empty if it does not.
        planned: what is missing; empty if nothing is, or it will stay so.
        out_of_scope: why it will stay missing; empty if it is here or planned.
    """

    family: str
    leaf: str
    published: tuple[str, ...]
    methods: tuple[str, ...] = ()
    here: str = ""
    planned: str = ""
    out_of_scope: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every attribute."""
        lists = {"published": list(self.published), "methods": list(self.methods)}
        return {**asdict(self), **lists}


@lru_cache(maxsize=1)
def taxonomy() -> tuple[Leaf, ...]:
    """Every leaf, family by family."""
    text = (files("autocompress") / "methods" / "taxonomy.yaml").read_text(encoding="utf-8")
    return tuple(_leaves(yaml.safe_load(text)))


def _leaves(families: list[dict[str, Any]]) -> Iterator[Leaf]:
    for family in families:
        for row in family["leaves"]:
            lists = {name: tuple(row.get(name, ())) for name in ("published", "methods")}
            yield Leaf(family["family"], **{**row, **lists})


def describe_taxonomy() -> dict[str, Any]:
    """The leaves, and the methods that other installed packages announce (not imported)."""
    return {
        "leaves": [leaf.to_json() for leaf in taxonomy()],
        "plugins": [
            {"name": point.name, "package": point.dist.name if point.dist else ""}
            for point in entry_points(group="autocompress.methods")
        ],
    }
