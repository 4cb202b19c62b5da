"""What a narrower part of a block means for each of its layers.

A space writes the share of the neurons or heads that stay; here it becomes, layer by layer, how
many stay of how many and which layer chooses them. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from autocompress.core.errors import SpaceError
from autocompress.core.layer import LayerSpec, Place
from autocompress.core.scheme import OptionValue, Stage
from autocompress.methods import METHODS, StageKind
from autocompress.spaces.expand import WrittenOption
from autocompress.spaces.match import READERS, part_of
from autocompress.spaces.schema import Ties

KEEP_RATIO = "keep_ratio"
_COUNTS = frozenset({"keep", "of", "by"})
MULTIPLE = 64
"""Widths are multiples of this where that leaves a choice: kernels and groups want it."""


def width_stage(option: WrittenOption) -> Stage | None:
    """The stage of an option that changes a width; None if it has none."""
    stages = option.scheme.stages
    return next((s for s in stages if METHODS[s.method].kind is StageKind.WIDTH), None)


def without_counts(stage: Stage) -> Stage:
    """`stage` without the share that stays, and without what that and the model decide."""
    if METHODS[stage.method].kind is not StageKind.WIDTH:
        return stage
    gone = _COUNTS | {KEEP_RATIO}
    return Stage(stage.method, tuple(o for o in stage.options if o[0] not in gone))


def check_width(option: WrittenOption, ties: Ties) -> None:
    """Refuse an option whose change of width no part of a block could take.

    Raises:
        SpaceError: says what to write instead.
    """
    stage = width_stage(option)
    if stage is None:
        return
    options = dict(stage.options)
    ratio = options.get(KEEP_RATIO)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise SpaceError(
            f"{option.where}: {KEEP_RATIO} is the share of the neurons or heads that stay, above 0 "
            f"and below 1, but got {ratio!r}. Write for example `{KEEP_RATIO}: 0.75`."
        )
    said = sorted(set(options) & _COUNTS)
    if said:
        raise SpaceError(
            f"{option.where}: how many stay of how many follows from {KEEP_RATIO} and the model, "
            f"but {stage.method!r} also got {', '.join(said)}. Leave {' and '.join(said)} out."
        )
    if not ties.sublayers:
        raise SpaceError(
            f"{option.where}: a part of a block is narrowed with all of its layers, but "
            "ties.sublayers is false. Write `ties: {sublayers: true}`."
        )


def width_options(
    stage: Stage, layer: LayerSpec, part: Sequence[LayerSpec], where: str
) -> dict[str, OptionValue] | None:
    """Options of the stage on one layer of a part: empty if the layer keeps its shape.

    Args:
        stage: with the share that stays.
        layer: one of `part`.
        part: all layers of one part of a block.
        where: place in the space file.

    Returns:
        None if the part cannot become narrower so: it is one of experts, nothing in it reads a
        width, its heads are not known, or the share leaves all units, or none.

    Raises:
        SpaceError: the layer is in no part of a block.
    """
    if layer.expert is None and part_of(layer) is None:
        raise SpaceError(
            f"{where}: neurons and heads are inside parts of blocks, but {layer.name!r} (role "
            f"{layer.role}) is in none. Leave its role out of the choice."
        )
    reader = next((x for x in part if x.role in READERS and x.expert is None), None)
    if reader is None:
        return None
    n_units = _units(reader, part)
    keep = 0 if n_units is None else _kept(n_units, float(dict(stage.options)[KEEP_RATIO]), reader)
    if n_units is None or not 1 <= keep < n_units:
        return None
    counts: dict[str, OptionValue] = {"keep": keep, "of": n_units}
    if layer is reader:
        return counts
    if not _writes(layer, reader, n_units):
        return {}
    place = Place.of(reader.name)
    assert place is not None  # a layer of a block has one
    return counts | {"by": place.after}


def _units(reader: LayerSpec, part: Sequence[LayerSpec]) -> int | None:
    """Neurons, or heads: those of keys and values where queries share several of them."""
    if reader.role == "down":
        return reader.in_features
    keys = {x.heads for x in part if x.role in {"key", "cross_key"} and x.heads}
    n_keys = keys.pop() if len(keys) == 1 else 1
    if reader.heads is not None and n_keys > 1 and reader.heads % n_keys == 0:
        return n_keys
    return reader.heads


def _kept(n_units: int, ratio: float, reader: LayerSpec) -> int:
    """Units that stay: the share, to a multiple that kernels want if there are enough."""
    size = reader.in_features // n_units
    step = MULTIPLE // math.gcd(MULTIPLE, size)
    if n_units < 4 * step:
        step = 1
    return max(step, round(n_units * ratio / step) * step)


def _writes(layer: LayerSpec, reader: LayerSpec, n_units: int) -> bool:
    """Whether the units are whole runs of the layer's outputs, in order.

    Layers that put out several things side by side (query, key and value; gate and up) keep their
    shape, and so do keys and values that all queries share.
    """
    if layer.role in {"gate", "up"}:
        return layer.out_features == reader.in_features
    if layer.role in {"query", "key", "value", "cross_query", "cross_key", "cross_value"}:
        return layer.heads is not None and layer.heads % n_units == 0
    return False
