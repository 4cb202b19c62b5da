"""What blocks and models return, as values that can be kept and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autocompress.models.prefix_plan import UnsupportedError

Output = Any
"""What a block returns: tensors, None and numbers, in nested tuples."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A block's output that may be handed out again.

    Attributes:
        output: the very object that the block returned.
        n_bytes: of the memory that it keeps alive.
        writes: torch's counts of writes to its tensors when it was returned.
    """

    output: Output
    n_bytes: int
    writes: tuple[int, ...]

    @classmethod
    def of(cls, output: Output) -> Entry:
        """An entry of what a block just returned.

        Raises:
            UnsupportedError: it holds something that might change or remember.
        """
        tensors = _tensors(output)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return cls(output, sum(storages.values()), _writes(tensors))

    @property
    def is_intact(self) -> bool:
        """True if nothing has written to it since."""
        return self.writes == _writes(_tensors(self.output))


def equal_outputs(got: Any, expected: Any) -> bool:
    """True if all tensors of two model outputs are equal bit by bit, and there are some."""
    one, other = _all_tensors(got), _all_tensors(expected)
    return len(one) == len(other) > 0 and all(map(_same, one, other))


def _writes(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


def _tensors(output: Output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    if output is None or isinstance(output, bool | int | float):
        return []
    raise UnsupportedError(f"a block returns a {type(output).__name__}, which cannot be kept")


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _all_tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return _all_tensors(tuple(output.values()))
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in _all_tensors(part)]
    return []
