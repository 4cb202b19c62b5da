"""Fewer neurons or heads: layers that are narrower than those of the base model.

A part of a block has a width inside: the neurons of its feed-forward, the heads of its attention.
One of its layers, the reader (down, output), reads that width, the others write it. A unit is one
neuron, or all the columns of a head. A method ranks units by what the reader loses without them;
the reader loses those columns, and the layers that write them lose those rows, which nobody reads
any more. Every stage after it sees a smaller layer.

``ziplm(keep=96,of=128)`` on ``model.layers.0.mlp.down_proj`` removes 32 inputs of it, and
``ziplm(by=mlp.down_proj,keep=96,of=128)`` on ``model.layers.0.mlp.up_proj`` the outputs that are
those inputs. The matrix that either decodes to has its full shape, zero where weights are gone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.core.layer import Place
from autocompress.core.scheme import Stage
from autocompress.methods.base import Method, StageKind
from autocompress.methods.coding import Damage, Stored
from autocompress.methods.packing import pack, packed_bytes, unpack
from autocompress.methods.problem import LayerProblem, LayerStatistics

_KEPT = "kept"


@dataclass(frozen=True, slots=True)
class WidthOptions:
    """Options that every method of this kind has; a search space writes `keep_ratio` for all three.

    Attributes:
        keep: units that stay, at least one and fewer than `of`.
        of: units that the base model has; they divide the inputs, or outputs, evenly.
        by: which layer of the block reads these outputs, by what follows the number of the block in
            its name; empty: the layer is the reader, and loses inputs.
    """

    keep: int = 1
    of: int = 2
    by: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of:
            raise SchemeError(
                f"keep must be at least 1 and below of, which is {self.of}, but got {self.keep}. "
                f"The nearest legal value is {min(max(self.keep, 1), max(self.of - 1, 1))}."
            )

    @property
    def cuts_outputs(self) -> bool:
        """True if rows of the matrix go, False if columns do."""
        return bool(self.by)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which units stay.

    Attributes:
        kept: (of,) bool.
        values: makes the columns of the reader that stay, (o, kept columns) float32; None
            if they stay as they are. Asked once, and not for layers that write the width.
        notes: for people.
    """

    kept: Tensor
    values: Callable[[], Tensor] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A layer without its lost units, as the stages after see it.

    Attributes:
        stored: what says which are left.
        problem: of the smaller layer.
        exact: its matrix in all its digits.
        notes: for people.
    """

    stored: dict[str, Tensor]
    problem: LayerProblem
    exact: Tensor
    notes: tuple[str, ...]


class Width(Method[WidthOptions]):
    """Removes neurons or heads."""

    kind = StageKind.WIDTH
    options = WidthOptions

    @abstractmethod
    def choose(self, reader: LayerProblem, options: WidthOptions) -> Chosen:
        """The units that stay, and the reader's columns of them.

        Args:
            reader: the layer that reads the width.
            options: how many stay; `by` is of no account.
        """

    def canonical(self, stage: Stage) -> Stage:
        """See `Method.canonical`; a reader's scheme does not say that it is one."""
        full = super().canonical(stage)
        return Stage(full.method, tuple(o for o in full.options if o != ("by", "")))

    def refusal(self, shape: tuple[int, int], options: WidthOptions) -> str:
        """See `Method.refusal`; units divide the width."""
        size, what = (shape[0], "outputs") if options.cuts_outputs else (shape[1], "inputs")
        if size % options.of == 0:
            return ""
        near = min(
            (n for n in range(2, size + 1) if size % n == 0), key=lambda n: abs(n - options.of)
        )
        return (
            f"of must divide the {size} {what}, but got {options.of}. "
            f"The nearest legal value is {near}."
        )

    def narrow(self, shape: tuple[int, int], options: WidthOptions) -> tuple[int, int]:
        """Shape of what is left of a matrix (o, d)."""
        o, d = shape
        if options.cuts_outputs:
            return o // options.of * options.keep, d
        return o, d // options.of * options.keep

    def layout(self, options: WidthOptions) -> dict[str, TensorLayout]:
        """Shapes and dtypes of what says which units are left: a bit each."""
        return {_KEPT: TensorLayout((packed_bytes(options.of, 1),), "uint8")}

    def narrowed(
        self,
        problem: LayerProblem,
        exact: Tensor,
        options: WidthOptions,
        reader: LayerProblem | None,
    ) -> Narrowed:
        """The layer without the units that go.

        Args:
            problem: the layer.
            exact: its matrix (o, d) in the base dtype.
            options: of this method.
            reader: the layer that reads its outputs, if it is not the reader itself.

        Raises:
            SchemeError: it needs a reader, or the units do not divide the inputs of that.
        """
        chosen = self.choose(self._reader(problem, options, reader), options)
        stored = {_KEPT: pack(chosen.kept.view(torch.uint8), 1)}
        left = columns_of(chosen.kept, exact.shape[0 if options.cuts_outputs else 1])
        if options.cuts_outputs:
            rows = exact[left]
            # H is that of the same inputs, so what follows from it is shared
            return Narrowed(stored, problem.with_weight(rows), rows, chosen.notes)

        def smaller() -> LayerProblem:
            values = exact[:, left] if chosen.values is None else chosen.values()
            statistics = _without(problem.statistics, left, f"{self.__class__.__name__}{options}")
            return LayerProblem(values, statistics)

        narrow = problem.derived((type(self), options), smaller)
        columns = exact[:, left] if chosen.values is None else narrow.weight
        return Narrowed(stored, narrow, columns, chosen.notes)

    def _reader(
        self, problem: LayerProblem, options: WidthOptions, reader: LayerProblem | None
    ) -> LayerProblem:
        found = reader if options.cuts_outputs else problem
        if found is None:
            raise SchemeError(
                f"The outputs that go are chosen by the layer that reads them, {options.by}, but "
                "it was not given. Next step: compress(..., reader=LayerProblem(its weight, its "
                "statistics))."
            )
        reason = self.refusal((0, found.weight.shape[1]), WidthOptions(options.keep, options.of))
        if reason:
            raise SchemeError(f"The layer {options.by or 'itself'} that reads the width: {reason}")
        return found

    def left(self, stored: Stored, size: int, options: WidthOptions) -> Tensor:
        """Indices of the inputs, or outputs, that are left of `size`."""
        kept = unpack(stored[_KEPT], 1, options.of).view(torch.bool)
        return columns_of(kept, size)

    def widened(
        self, narrow: Tensor, stored: Stored, shape: tuple[int, int], options: WidthOptions
    ) -> Tensor:
        """A smaller layer's matrix as one of `shape`, zero where weights are gone."""
        dim = 0 if options.cuts_outputs else 1
        left = self.left(stored, shape[dim], options).to(narrow.device)
        return narrow.new_zeros(shape).index_copy_(dim, left, narrow)

    def damage(self, stored: Stored, options: WidthOptions) -> Damage | None:
        """What is wrong with the stored bits; None if nothing is."""
        n_kept = int(unpack(stored[_KEPT], 1, options.of).sum())
        if n_kept == options.keep:
            return None
        return Damage(_KEPT, f"must keep {options.keep} of {options.of} units, but keeps {n_kept}")


def reader_of(name: str, options: WidthOptions) -> str:
    """Name of the layer that reads the outputs of the layer called `name`.

    Raises:
        SchemeError: the name holds no number of a block.
    """
    place = Place.of(name)
    if place is None:
        raise SchemeError(
            f"by={options.by} is a layer of the same block, but {name} is in no block. Next step: "
            "remove outputs of layers in blocks alone."
        )
    return replace(place, after=options.by).at(place.number)


def keep_best(scores: Tensor, keep: int) -> Tensor:
    """(of,) bool: the units of the `keep` highest scores; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, order[:keep], True)


def columns_of(kept: Tensor, size: int) -> Tensor:
    """Indices of the columns of the units that are kept, in order, of `size` columns."""
    return kept.repeat_interleave(size // len(kept)).nonzero().view(-1)


def _without(statistics: LayerStatistics, left: Tensor, how: str) -> LayerStatistics:
    """Of the inputs that are left: the block of H."""
    hessian = statistics.hessian
    if hessian is None:
        return statistics
    there = left.to(hessian.device)
    part = hessian[there][:, there]
    return replace(statistics, hessian=part, digest=f"{statistics.digest}.{how}")
