"""What layers that share go through together, and who they are.

A scheme that shares has one stage with the option ``blocks``, ``0/1``: the numbers by which the
names of the layers differ. ``basis_sharing(blocks=0/1,rank=96)`` on ``model.layers.1.mlp.up_proj``
shares with ``model.layers.0.mlp.up_proj``, which as the first of them stores what they share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.core.digest import digest
from autocompress.core.errors import SchemeError
from autocompress.core.layer import Place
from autocompress.methods.base import Method, OptionsT, StageKind
from autocompress.methods.problem import LayerProblem, LayerStatistics

BLOCKS = "blocks"
_BETWEEN = "/"


class Sharing(ABC):
    """What a method is besides its kind if several layers go through its stage together."""

    @abstractmethod
    def is_shared(self, tensor: str) -> bool:
        """Whether the tensor of that name, of the stages up to quantize, is one for all layers."""


class Tie(Method[OptionsT], Sharing):
    """Gives layers one matrix, which the stages after it compress and all of them share."""

    kind = StageKind.SHARE

    @abstractmethod
    def target(
        self, problems: Sequence[LayerProblem], options: OptionsT
    ) -> tuple[Tensor, tuple[str, ...]]:
        """The matrix (o, d) float32 that stands for all, and notes."""

    def is_shared(self, tensor: str) -> bool:  # noqa: ARG002 - every tensor is
        """See `Sharing.is_shared`."""
        return True


def written_blocks(numbers: Sequence[int]) -> str:
    """The value of ``blocks`` that means these numbers."""
    return _BETWEEN.join(map(str, numbers))


def read_blocks(text: str) -> tuple[int, ...]:
    """The numbers that a value of ``blocks`` means; none for the empty one, which a space fills.

    Raises:
        SchemeError: it is not two or more rising numbers.
    """
    if not text:
        return ()
    parts = text.split(_BETWEEN)
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    if len(numbers) < max(2, len(parts)) or list(numbers) != sorted(set(numbers)):
        raise SchemeError(
            f"{BLOCKS} must be two or more rising numbers with {_BETWEEN} between them, but got "
            f"{text!r}. Write 0/1, or leave it out in a search space, whose `span` says it."
        )
    if text != written_blocks(numbers):
        raise SchemeError(
            f"{BLOCKS} must be plain numbers, but got {text!r}. Write {written_blocks(numbers)}."
        )
    return numbers


def names_of(name: str, blocks: Sequence[int]) -> tuple[str, ...]:
    """Names of the layers that share with `name`, itself among them.

    Raises:
        SchemeError: it is none of them.
    """
    place = Place.of(name)
    if place is None or place.number not in blocks:
        written = written_blocks(blocks)
        got = f"{BLOCKS}={written}" if blocks else "none"
        raise SchemeError(
            f"Layers that share are those whose names differ in the number of the block, and "
            f"{name} must be one of them, but got {got}. Next step: write `span: 2` into the "
            "choice of the search space, or name the block of the layer."
        )
    return tuple(place.at(number) for number in blocks)


def pooled(problems: Sequence[LayerProblem], blocks: Sequence[int]) -> LayerProblem:
    """All the layers as one: weights (n o, d) stacked, H of all their inputs together.

    It is kept by the first problem, so that options share its decompositions.
    """
    key = "pooled", *blocks, *(problem.statistics.digest for problem in problems)
    return problems[0].derived(key, lambda: _pooled(problems))


def _pooled(problems: Sequence[LayerProblem]) -> LayerProblem:
    stacked = torch.cat([problem.weight for problem in problems])
    return LayerProblem(stacked, pooled_statistics(problems))


def pooled_statistics(problems: Sequence[LayerProblem]) -> LayerStatistics:
    """``E[x x^T]`` over the inputs of all the layers; none unless each has statistics."""
    n_tokens = sum(problem.n_tokens for problem in problems)
    hessians = [p.hessian * p.n_tokens for p in problems if p.hessian is not None]
    if len(hessians) < len(problems) or not n_tokens:
        return LayerStatistics.none()
    together = torch.stack(hessians).sum(0) / n_tokens
    return LayerStatistics(together, n_tokens, digest([p.statistics.digest for p in problems]))
