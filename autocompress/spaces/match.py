"""Which choice each layer belongs to, and which layers are tied. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import takewhile
from types import MappingProxyType

from autocompress.core.errors import SpaceError, nearest
from autocompress.core.layer import BLOCKS, Among, LayerSpec, Place
from autocompress.spaces.catalog import SpaceFile
from autocompress.spaces.schema import ChoiceSpec, Ties

_QKV = "query, key and value"
_TIES: Mapping[str, tuple[str, str]] = {
    "query": ("qkv", _QKV), "key": ("qkv", _QKV), "value": ("qkv", _QKV),
    "cross_key": ("qkv", "cross_key and cross_value"),
    "cross_value": ("qkv", "cross_key and cross_value"),
    "gate": ("gate_up", "gate and up"), "up": ("gate_up", "gate and up"),
}  # fmt: skip
"""Role to the switch in the file and the roles that it ties."""

_SUBLAYERS: Mapping[str, str] = {
    "query": "attention", "key": "attention", "value": "attention", "qkv": "attention",
    "output": "attention",
    "cross_query": "cross-attention", "cross_key": "cross-attention",
    "cross_value": "cross-attention", "cross_output": "cross-attention",
    "gate": "feed-forward", "up": "feed-forward", "gate_up": "feed-forward",
    "down": "feed-forward",
}  # fmt: skip
"""Role to the part of its block."""

READERS: tuple[str, ...] = ("output", "cross_output", "down")
"""Roles of the layers that read what the others of their part put out."""

_EXPERTS = ("expert_groups", "experts of one part")
_WHOLE = ("whole_experts", "all layers of an expert")
_OFF = {"expert_groups": "0"}

_TieKey = tuple[str, ...]


@dataclass(frozen=True)
class TiedLayers:
    """Layers that take one option together; often one layer alone.

    Attributes:
        choice: index in the file of the choice that they belong to.
        layers: in execution order.
        n_before: if they are layers of experts, experts of their block in parts before theirs.
    """

    choice: int
    layers: tuple[LayerSpec, ...]
    n_before: int = 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the blocks whose layers differ in that number alone; none but for a span."""
        places = [layer.place for layer in self.layers]
        numbers = sorted({place.number for place in places if place is not None})
        return tuple(numbers) if len(numbers) > 1 else ()

    def sharing(self, layer: LayerSpec, among: Among) -> tuple[int, ...]:
        """Numbers of the blocks, or experts, whose layers may share with `layer`; none if none."""
        if among == BLOCKS:
            return self.numbers
        stack = _stack_of(layer)
        experts = [x.expert.index for x in self.layers if x.expert and _stack_of(x) == stack]
        return tuple(sorted(experts)) if len(experts) > 1 else ()

    @property
    def name(self) -> str:
        """``a.b.c`` for one layer, ``a.b.{c,d}`` for tied ones, ``a.{0,1}.b.{c,d}`` for a span."""
        numbers = self.numbers
        if numbers:
            of_one = [x for x in self.layers if x.place and x.place.number == numbers[0]]
            first = Place.of(TiedLayers(self.choice, tuple(of_one)).name)
            assert first is not None  # its layers have that number
            return f"{first.before}.{{{','.join(map(str, numbers))}}}.{first.after}"
        names = [layer.name for layer in self.layers]
        if len(names) == 1:
            return names[0]
        levels = zip(*(name.split(".") for name in names), strict=False)
        common = takewhile(lambda parts: len(set(parts)) == 1, levels)
        prefix = "".join(f"{parts[0]}." for parts in common)
        return f"{prefix}{{{','.join(name.removeprefix(prefix) for name in names)}}}"


def match(
    file: SpaceFile, layers: Sequence[LayerSpec], routed: Mapping[str, int] = MappingProxyType({})
) -> tuple[TiedLayers, ...]:
    """Give every layer to the first choice that selects it and join those that are tied.

    Args:
        file: the space.
        layers: all compressible layers of the model, in execution order.
        routed: by name of a layer of an expert, the calibration tokens that are sent to it. Where
            it is not known, experts are sorted by their number.

    Returns:
        In execution order of their first layers. Layers that no choice selects are left out.

    A choice with a `span` joins what does the same in that many adjacent blocks of those that it
    selects; what is left over at the end of a stack is joined as it is.

    Raises:
        SpaceError: a choice that is not optional selects nothing (or one of its patterns or
            blocks does), all that it selects belongs to earlier choices, or two choices share the
            members of a tied set.
    """
    owners = _owners(file, layers)
    ties = file.spec.ties
    parts = _expert_parts(layers, ties, routed if ties.experts_by == "routing" else {})
    tied: dict[_TieKey, list[LayerSpec]] = {}
    for layer in layers:
        if layer.name in owners:
            part = parts.get(layer.name)
            key = _tie_key(layer, ties) if part is None else part.key
            tied.setdefault(key, []).append(layer)
    sets = [_one_owner(members, owners, file) for members in tied.values()]
    sets = [replace(s, n_before=_n_before(s, parts)) for s in sets]
    order = {layer.name: index for index, layer in enumerate(layers)}
    return tuple(sorted(_spanned(sets, file), key=lambda found: order[found.layers[0].name]))


def _spanned(sets: Sequence[TiedLayers], file: SpaceFile) -> Iterator[TiedLayers]:
    """Tied sets, those of a choice with a span joined over blocks."""
    runs: dict[object, list[TiedLayers]] = {}
    for index, tied in enumerate(sets):
        wide = file.spec.choices[tied.choice].span > 1
        runs.setdefault(_span_key(tied) if wide else index, []).append(tied)
    for run in runs.values():
        choice = run[0].choice
        span = file.spec.choices[choice].span
        for start in range(0, len(run), span):
            joined = run[start : start + span]
            layers = tuple(x for tied in joined for x in tied.layers)
            yield TiedLayers(choice, layers, min(tied.n_before for tied in joined))


def _span_key(tied: TiedLayers) -> object:
    """Equal for tied sets that may share: they differ in the number of the block alone."""
    return (
        tied.choice,
        *(
            (layer.place and (layer.place.before, layer.place.after)) or layer.name
            for layer in tied.layers
        ),
        *((x.out_features, x.in_features, x.dtype, x.kind) for x in tied.layers),
    )


def _owners(file: SpaceFile, layers: Sequence[LayerSpec]) -> dict[str, int]:
    owners: dict[str, int] = {}
    for index, choice in enumerate(file.spec.choices):
        selected = [layer for layer in layers if _selects(choice, layer, layers)]
        if not choice.optional:
            _check_selection(file, index, layers, selected, owners)
        for layer in selected:
            owners.setdefault(layer.name, index)
    return owners


def _selects(choice: ChoiceSpec, layer: LayerSpec, layers: Sequence[LayerSpec]) -> bool:
    if choice.roles is not None and layer.role not in choice.roles:
        return False
    if choice.layers is not None and not any(_matches(p, layer) for p in choice.layers):
        return False
    if layer.role == "router" and not _names_routers(choice, layer, layers):
        return False
    return choice.blocks is None or layer.block in set(_blocks(choice.blocks, layers))


def _names_routers(choice: ChoiceSpec, layer: LayerSpec, layers: Sequence[LayerSpec]) -> bool:
    """Whether the choice means routers, not merely all that is there: few bytes, much damage."""
    if choice.roles is not None:
        return True
    patterns = [p for p in choice.layers or () if _matches(p, layer)]
    return any(all(x.role == "router" for x in layers if _matches(p, x)) for p in patterns)


def _matches(pattern: str, layer: LayerSpec) -> bool:
    return any(fnmatchcase(name, pattern) for name in (layer.name, *layer.aliases))


def _blocks(blocks: Iterable[int], layers: Sequence[LayerSpec]) -> Iterator[int]:
    """Block numbers with negative ones counted from the last block."""
    n_blocks = _n_blocks(layers)
    yield from (block if block >= 0 else n_blocks + block for block in blocks)


def _n_blocks(layers: Sequence[LayerSpec]) -> int:
    return 1 + max((layer.block for layer in layers if layer.block is not None), default=-1)


def _check_selection(
    file: SpaceFile,
    index: int,
    layers: Sequence[LayerSpec],
    selected: Sequence[LayerSpec],
    owners: Mapping[str, int],
) -> None:
    choice = file.spec.choices[index]
    problem = next(_empty_selectors(choice, layers), None)
    if problem is not None:
        where = file.source.at(("choices", index, *problem.field))
        raise SpaceError(
            f"{where}: {problem.text} Correct it, or mark the choice `optional: true`."
        )
    where = file.source.at(("choices", index))
    if not selected:
        raise SpaceError(
            f"{where}: a choice must select at least one layer, but no layer of the model meets "
            "all of its selectors (roles, layers, blocks) at once. Drop one of them, or mark the "
            "choice `optional: true`."
        )
    if all(layer.name in owners for layer in selected):
        first = owners[selected[0].name]
        raise SpaceError(
            f"{where}: a layer belongs to the first choice that selects it, but all "
            f"{len(selected)} layers of this one belong to earlier choices "
            f"({selected[0].name!r} to {file.source.at(('choices', first))}). "
            "Move this choice up, or remove it."
        )


@dataclass(frozen=True)
class _Problem:
    """A selector that matches nothing by itself: its place in the choice, and what is wrong."""

    field: tuple[str | int, ...]
    text: str


def _empty_selectors(choice: ChoiceSpec, layers: Sequence[LayerSpec]) -> Iterator[_Problem]:
    roles = sorted({layer.role for layer in layers})
    if choice.roles is not None and not set(choice.roles) & set(roles):
        text = (
            "the roles of a choice must occur in the model, but none of "
            f"{', '.join(choice.roles)} does. {nearest(choice.roles[0], roles)}"
        )
        yield _Problem(("roles",), text)
    for i, pattern in enumerate(choice.layers or ()):
        if not any(_matches(pattern, layer) for layer in layers):
            text = (
                f"a pattern must match at least one layer, but {pattern!r} matches none of "
                f"{len(layers)}. {nearest(pattern, _patterns_like(pattern, layers))}"
            )
            yield _Problem(("layers", i), text)
    n_blocks = _n_blocks(layers)
    for i, block in enumerate(choice.blocks or ()):
        if not -n_blocks <= block < n_blocks:
            text = f"a block is a number from {-n_blocks} to {n_blocks - 1}, but got {block}."
            yield _Problem(("blocks", i), text)


def _patterns_like(pattern: str, layers: Sequence[LayerSpec]) -> set[str]:
    """Patterns that do match, as specific as the one that does not."""
    names = [name for layer in layers for name in (layer.name, *layer.aliases)]
    if pattern.startswith("*"):
        n_parts = pattern.lstrip("*").lstrip(".").count(".") + 1
        return {"*" + ".".join(name.split(".")[-n_parts:]) for name in names}
    if "*" in pattern:
        return {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names}
    return set(names)


def part_of(layer: LayerSpec) -> str | None:
    """The part of its block that a layer belongs to; None if to none."""
    return None if layer.block is None or layer.expert else _SUBLAYERS.get(layer.role)


def _tie_key(layer: LayerSpec, ties: Ties) -> _TieKey:
    """Equal for layers that must take one option: same block, same input, tied roles."""
    part = part_of(layer)
    if ties.sublayers and part is not None:
        return ("sublayer", part, str(layer.block))
    switch, roles = _TIES.get(layer.role, ("", ""))
    if layer.block is None or not switch or not getattr(ties, switch):
        return (layer.name,)
    return (roles, str(layer.block), layer.input_name or "")


@dataclass(frozen=True)
class _Part:
    """What the part of an expert is known by, equal for tied layers, and experts before it."""

    key: _TieKey
    n_before: int


def _expert_parts(
    layers: Sequence[LayerSpec], ties: Ties, routed: Mapping[str, int]
) -> dict[str, _Part]:
    """The part that each layer of an expert is in."""
    stacks: dict[str, list[LayerSpec]] = {}
    for layer in layers:
        if layer.expert is not None:
            stacks.setdefault(_stack_of(layer), []).append(layer)
    parts: dict[str, _Part] = {}
    for name, stack in stacks.items():
        stack.sort(key=lambda layer: -routed.get(layer.name, 0))  # stable
        n_parts = ties.expert_groups or len(stack)
        holder = name.rpartition(".")[0] if ties.whole_experts else name
        numbers = [place * n_parts // len(stack) for place in range(len(stack))]
        for layer, number in zip(stack, numbers, strict=True):
            key = ("experts", holder, str(number))
            parts[layer.name] = _Part(key, numbers.index(number))
    return parts


def _stack_of(layer: LayerSpec) -> str:
    """What the layers of one role of a block's experts have in common."""
    return layer.name.rpartition(".")[0]


def _n_before(tied: TiedLayers, parts: Mapping[str, _Part]) -> int:
    part = parts.get(tied.layers[0].name)
    return 0 if part is None else part.n_before


def _one_owner(
    members: Sequence[LayerSpec], owners: Mapping[str, int], file: SpaceFile
) -> TiedLayers:
    first = members[0]
    for layer in members[1:]:
        if owners[layer.name] != owners[first.name]:
            switch, roles = _TIES.get(layer.role, _EXPERTS)
            if file.spec.ties.sublayers:
                switch, roles = "sublayers", f"all layers of the {_SUBLAYERS[layer.role]}"
            if layer.expert is not None:
                switch, roles = _EXPERTS if layer.role == first.role else _WHOLE
            where = [file.source.at(("choices", owners[m.name])) for m in (first, layer)]
            raise SpaceError(
                f"{where[1]}: ties.{switch} says that {roles} of a block take one option, but "
                f"{first.name!r} belongs to {where[0]} and {layer.name!r} to this choice. Put "
                f"them in one choice, or write `ties: {{{switch}: {_OFF.get(switch, 'false')}}}`."
            )
    return TiedLayers(owners[first.name], tuple(members))
