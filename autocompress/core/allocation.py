"""Allocations: one scheme for every layer of a search space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from autocompress.core.digest import digest
from autocompress.core.scheme import BASE_SCHEME, Scheme


@dataclass(frozen=True, slots=True)
class Allocation(Mapping[str, Scheme]):
    """A scheme by layer name, sorted by name. Layers that are absent stay uncompressed.

    Two allocations are equal, and have the same digest, if they compress the model alike: layers
    with the base scheme are left out on construction by `of`.
    """

    items_: tuple[tuple[str, Scheme], ...] = ()
    _index: dict[str, Scheme] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", dict(self.items_))

    @classmethod
    def of(cls, schemes: Mapping[str, Scheme]) -> Allocation:
        """An allocation without its base-scheme entries."""
        return cls(tuple(sorted((n, s) for n, s in schemes.items() if not s.is_base)))

    def __getitem__(self, name: str) -> Scheme:
        return self._index[name]

    def scheme(self, name: str) -> Scheme:
        """The scheme of a layer; the base scheme if the allocation does not name it."""
        return self._index.get(name, BASE_SCHEME)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __hash__(self) -> int:
        return hash(self.items_)

    @property
    def digest(self) -> str:
        """Stable across processes; equal for equal allocations."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, str]:
        """Layer name to the text of its scheme."""
        return {name: str(scheme) for name, scheme in self.items_}

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> Allocation:
        """The inverse of `to_json`."""
        return cls.of({name: Scheme.parse(text) for name, text in data.items()})


BASE_ALLOCATION = Allocation()
