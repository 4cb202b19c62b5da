"""A Pareto front of anything that has losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from autocompress.fronts.geometry import hypervolume, non_dominated

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Front(Generic[T]):
    """The non-dominated candidates with their losses, in ascending order of the losses.

    Attributes:
        members: no candidate dominates any of them; equal losses are all kept.
        points: losses of each member, all minimised.
    """

    members: tuple[T, ...] = ()
    points: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, candidates: Iterable[T], key: Callable[[T], Sequence[float]]) -> Front[T]:
        """The front of `candidates`.

        Args:
            candidates: in any order; one whose losses contain a NaN is left out.
            key: losses of a candidate, all minimised, equally many for each.
        """
        pairs = [(tuple(float(loss) for loss in key(item)), item) for item in candidates]
        if not pairs:
            return cls()
        mask = non_dominated([point for point, _ in pairs])
        kept = [pair for pair, keep in zip(pairs, mask, strict=True) if keep]
        kept.sort(key=lambda pair: pair[0])
        return cls(tuple(item for _, item in kept), tuple(point for point, _ in kept))

    def hypervolume(self, reference: Sequence[float]) -> float:
        """Volume that the front dominates within the box below `reference`."""
        return hypervolume(self.points, reference) if self.points else 0.0

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[T]:
        return iter(self.members)

    def __getitem__(self, index: int) -> T:
        return self.members[index]
