"""What layers that share go through together, and who they are.

A scheme that shares has one stage with the option ``blocks``, ``0/1``: the numbers by which the
names of the layers differ. ``basis_sharing(blocks=0/1,rank=96)`` on ``model.layers.1.mlp.up_proj``
shares with ``model.layers.0.mlp.up_proj``, which as the first of them stores what they share. The
option ``experts`` says the same of the experts of one block, by the last number in their names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.core.digest import digest
from autocompress.core.errors import SchemeError
from autocompress.core.layer import BLOCKS, EXPERTS, Among, Place
from autocompress.methods.base import Method, OptionsT, Quantizer, StageKind
from autocompress.methods.coding import Quantized
from autocompress.methods.problem import DAMPING, LayerProblem, LayerStatistics

_PLACES = {BLOCKS: Place.of, EXPERTS: Place.of_expert}
_WHO = {
    BLOCKS: (
        "differ in the number of the block",
        "write `span: 2` into the choice of the search space, or name the block of the layer.",
    ),
    EXPERTS: (
        "are of experts of one block and differ in their number",
        "write `ties: {expert_groups: N}` into the search space, N below the number of experts, "
        "or name the expert of the layer.",
    ),
}
_SAID_BY = {BLOCKS: "whose `span` says it", EXPERTS: "whose `expert_groups` says it"}
_BETWEEN = "/"


class Sharing(ABC):
    """What a method is besides its kind if several layers go through its stage together.

    Attributes:
        among: what the layers belong to; the name of the option that says which.
    """

    among: ClassVar[Among] = BLOCKS

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

    def statistics(self, problems: Sequence[LayerProblem]) -> LayerStatistics:
        """What the stages after it compress that matrix with."""
        return pooled_statistics(problems)

    def is_shared(self, tensor: str) -> bool:  # noqa: ARG002 - every tensor is
        """See `Sharing.is_shared`."""
        return True


class SharedQuantizer(Quantizer[OptionsT], Sharing):
    """Quantizes layers together; what some of the parameters say holds for all of them."""

    @abstractmethod
    def quantize_together(
        self, problems: Sequence[LayerProblem], options: OptionsT
    ) -> list[Quantized]:
        """Each layer's codes, with all of its parameters: those that are shared are equal."""

    def quantize(
        self,
        problem: LayerProblem,
        mask: Tensor | None,  # noqa: ARG002 - codings that layers share are not maskable
        options: OptionsT,
    ) -> Quantized:
        """See `Quantizer.quantize`; of a layer by itself."""
        return self.quantize_together([problem], options)[0]


def written_numbers(numbers: Sequence[int]) -> str:
    """The value of ``blocks`` or ``experts`` that means these numbers."""
    return _BETWEEN.join(map(str, numbers))


def read_numbers(text: str, among: Among = BLOCKS) -> tuple[int, ...]:
    """The numbers that a value of the option `among` means; none for the empty one.

    A search space fills that in.

    Raises:
        SchemeError: it is not two or more rising numbers.
    """
    if not text:
        return ()
    parts = text.split(_BETWEEN)
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    if len(numbers) < max(2, len(parts)) or list(numbers) != sorted(set(numbers)):
        raise SchemeError(
            f"{among} must be two or more rising numbers with {_BETWEEN} between them, but got "
            f"{text!r}. Write 0/1, or leave it out in a search space, {_SAID_BY[among]}."
        )
    if text != written_numbers(numbers):
        raise SchemeError(
            f"{among} must be plain numbers, but got {text!r}. Write {written_numbers(numbers)}."
        )
    return numbers


def names_of(name: str, numbers: Sequence[int], among: Among = BLOCKS) -> tuple[str, ...]:
    """Names of the layers of these blocks, or experts, that share with `name`, itself among them.

    Raises:
        SchemeError: it is none of them.
    """
    place = _PLACES[among](name)
    if place is None or place.number not in numbers:
        differ, next_step = _WHO[among]
        got = f"{among}={written_numbers(numbers)}" if numbers else "none"
        raise SchemeError(
            f"Layers that share are those whose names {differ}, and {name} must be one of them, "
            f"but got {got}. Next step: {next_step}"
        )
    return tuple(place.at(number) for number in numbers)


def pooled(problems: Sequence[LayerProblem], numbers: Sequence[int]) -> LayerProblem:
    """All the layers as one: weights (n o, d) stacked, H of all their inputs together.

    It is kept by the first problem, so that options share its decompositions.
    """
    key = "pooled", *numbers, *(problem.statistics.digest for problem in problems)
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


def nearest_mean(problems: Sequence[LayerProblem], counts: Sequence[float]) -> Tensor:
    """The matrix nearest to the layers in their outputs, each counted so often.

    ``(sum_i W_i G_i) (sum_i G_i)^-1``, ``G_i = n_i H_i`` damped by its own mean diagonal; every
    problem has statistics.
    """
    total = torch.zeros(1, dtype=torch.float64, device=problems[0].weight.device)
    crossed = total
    for problem, count in zip(problems, counts, strict=True):
        assert problem.hessian is not None  # callers have checked
        hessian = problem.hessian.double()
        ridge = DAMPING * float(hessian.diagonal().mean()) or 1.0
        identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        damped = count * (hessian + ridge * identity)
        total = total + damped
        crossed = crossed + problem.weight.double() @ damped
    mean: Tensor = torch.linalg.solve(total, crossed, left=False)
    return mean.float()
