"""Which layers run before the end of which block: observed in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from autocompress.models.layout import ModelLayout


class UnsupportedError(Exception):
    """Why prefixes of a model cannot be shared; never reaches a user."""


@dataclass(frozen=True, slots=True)
class Step:
    """A block, at its place in the order of execution.

    Attributes:
        name: of the block.
        stack: name of the list of blocks that it belongs to.
        layers: those that run for the first time between the end of the block before and the end
            of this one.
    """

    name: str
    stack: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """The blocks of a model in the order of execution, stack by stack."""

    steps: tuple[Step, ...]

    def resumed_by(self, last: int) -> tuple[int, ...]:
        """Steps whose outputs a forward needs that skips all blocks up to `last`.

        The last block of every stack before, and `last` itself.
        """
        ends = [i for i in self._stack_ends() if i < last]
        return (*ends, last)

    def every(self, stride: int) -> frozenset[int]:
        """Each `stride`-th step, and the last one of every stack but the last stack."""
        ends = self._stack_ends()[:-1]
        return frozenset((*range(stride - 1, len(self.steps), stride), *ends))

    def _stack_ends(self) -> list[int]:
        steps = self.steps
        return [
            i for i, s in enumerate(steps) if i + 1 == len(steps) or steps[i + 1].stack != s.stack
        ]


@dataclass(frozen=True, slots=True)
class Event:
    """The start of a layer's module, or the start or end of a block."""

    kind: str
    name: str


class Trace:
    """Records one forward; `finish` takes the hooks off again.

    Args:
        module: is about to run one forward.
        layout: of the module.
    """

    def __init__(self, module: nn.Module, layout: ModelLayout) -> None:
        self._events: list[Event] = []
        self._hooks: list[Any] = []
        for layer in layout.layers:
            for holder in (layer.name, *layer.aliases):
                self._before(module.get_submodule(holder), "layer", layer.name)
        for block in layout.blocks:
            child = module.get_submodule(block)
            self._before(child, "start", block)
            self._hooks.append(child.register_forward_hook(self._note("end", block)))

    def finish(self) -> tuple[Event, ...]:
        """What happened, in order."""
        for hook in self._hooks:
            hook.remove()
        return tuple(self._events)

    def _before(self, child: nn.Module, kind: str, name: str) -> None:
        self._hooks.append(child.register_forward_pre_hook(self._note(kind, name)))

    def _note(self, kind: str, name: str) -> Callable[..., None]:
        def note(*_: object) -> None:
            self._events.append(Event(kind, name))

        return note


def make_plan(events: Sequence[Event], layout: ModelLayout) -> PrefixPlan:
    """The plan of a traced forward.

    A layer that was not seen to run may be used without its module: it counts as running first,
    but an expert that no token was sent to with its block.

    Raises:
        UnsupportedError: blocks do not run one after the other, each once, stack by stack.
    """
    order = _block_order(events)
    position = {name: i for i, name in enumerate(order)}
    first = _first_uses(events)
    layers: list[list[str]] = [[] for _ in order]
    for layer in layout.layers:
        place = first.get(layer.name, 0 if layer.expert is None else len(order))
        if layer.block is not None:
            place = min(place, position.get(layout.blocks[layer.block], place))
        if place < len(order):
            layers[place].append(layer.name)
    return PrefixPlan(
        tuple(Step(n, _stack(n), tuple(ls)) for n, ls in zip(order, layers, strict=True))
    )


def _block_order(events: Sequence[Event]) -> list[str]:
    blocks = [event for event in events if event.kind != "layer"]
    order = [event.name for event in blocks if event.kind == "end"]
    if not order:
        raise UnsupportedError("none of its blocks runs in a forward")
    repeated = next((name for name in order if order.count(name) > 1), None)
    if repeated is not None:
        raise UnsupportedError(f"its block {repeated} runs more than once in a forward")
    expected = [Event(kind, name) for name in order for kind in ("start", "end")]
    if blocks != expected:
        raise UnsupportedError("its blocks do not run one after the other")
    stacks = [stack for stack, _ in groupby(order, _stack)]
    if len(set(stacks)) != len(stacks):
        raise UnsupportedError("its stacks of blocks take turns")
    return order


def _first_uses(events: Sequence[Event]) -> dict[str, int]:
    """For each layer that ran, the number of blocks that had ended before it first did."""
    first: dict[str, int] = {}
    n_ended = 0
    for event in events:
        if event.kind == "end":
            n_ended += 1
        elif event.kind == "layer":
            first.setdefault(event.name, n_ended)
    return first


def _stack(block: str) -> str:
    return block.rpartition(".")[0]
