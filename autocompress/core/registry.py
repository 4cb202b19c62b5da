"""A registry of named implementations with clear errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from autocompress.core.errors import UnknownNameError, UsageError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to values of one kind, in order of registration.

    Args:
        kind: what is registered, singular, as it appears in messages ("method").
        entry_point_group: group of the entry points by which other packages register theirs; each
            has the name under which its module registers when imported. Loaded on the first
            lookup, so that importing this package stays cheap.
    """

    def __init__(self, kind: str, entry_point_group: str | None = None) -> None:
        self.kind = kind
        self._group = entry_point_group
        self._items: dict[str, T] = {}
        self._plugins_loaded = entry_point_group is None

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a value under `name`.

        Raises:
            UsageError: the name is already taken.
        """

        def add(item: T) -> T:
            self.add(name, item)
            return item

        return add

    def add(self, name: str, item: T) -> None:
        """Register `item` under `name`; raises `UsageError` if the name is taken."""
        if name in self._items:
            raise UsageError(
                f"A {self.kind} name must be unique, but {name!r} is already registered by "
                f"{self._items[name]!r}. Choose another name."
            )
        self._items[name] = item

    def __getitem__(self, name: str) -> T:
        """The value registered under `name`; raises `UnknownNameError` with the nearest names."""
        self._load_plugins()
        if name not in self._items:
            raise UnknownNameError(f"Unknown {self.kind} {name!r}. {nearest(name, self._items)}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(tuple(self._items))

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._items)

    def _load_plugins(self) -> None:
        if self._plugins_loaded or self._group is None:
            return
        self._plugins_loaded = True  # a plug-in may look names up while it loads
        try:
            for point in entry_points(group=self._group):
                self._load(point)
        except UsageError:
            self._plugins_loaded = False  # so that the next lookup says so as well
            raise

    def _load(self, point: EntryPoint) -> None:
        """Import a plug-in, which registers itself.

        Raises:
            UsageError: it cannot be imported, or did not register what it announces.
        """
        try:
            point.load()
        except Exception as error:
            reason = f"importing {point.value} failed: {type(error).__name__}: {error}"
            raise UsageError(self._broken(point, reason)) from error
        if point.name not in self._items:
            reason = f"importing {point.value} registered nothing under that name"
            raise UsageError(self._broken(point, reason))

    def _broken(self, point: EntryPoint, reason: str) -> str:
        package = "an installed package" if point.dist is None else f"the package {point.dist.name}"
        return (
            f"The {self.kind} {point.name!r} comes from {package}, but {reason}. Next step: repair "
            "or uninstall that package."
        )
