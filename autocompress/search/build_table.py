"""Fill the option table: compress every layer with every option, predict what each one damages.

The bank is filled on the way, by the workers of a driver if there are any, so a search that follows
finds its options built. A finished table is kept as JSON under a digest of all that it depends on.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autocompress.bank import Bank
from autocompress.core import LayerSpec, Scheme, digest
from autocompress.core.files import write_atomically
from autocompress.cost import CostModel
from autocompress.methods import (
    METHODS,
    CompressedWeight,
    StageKind,
    decode,
    drops,
    input_errors,
    unread_rows,
)
from autocompress.models import LayerCurvature, ModelLayout, predicted_damage
from autocompress.models.slopes import ErrorsOf
from autocompress.search.option_costs import option_costs
from autocompress.search.option_table import Floats, OptionCosts, OptionTable, PerChoice
from autocompress.search.probe import Probe, corrected, group_of
from autocompress.spaces import READERS, Choice, Option, SearchSpace

_log = logging.getLogger(__name__)

_FORMAT = "option table 5"

MOST_EXACT = 20
"""Options of a layer that are all compressed to predict them. Where there are more, a scheme that
factorizes, sparsifies and quantizes is predicted as the sum of these stages alone: 7 compressions
instead of 28 where 2 ranks, 1 sparsity and 4 widths are combined. The trials correct what that
misses."""

_WEIGHTS, _INPUTS = 0, 1  # rows of the damages of a layer, see `_damages`

_ADDS_UP = {StageKind.FACTORIZE, StageKind.SPARSIFY, StageKind.QUANTIZE}

NOT_FINITE = 1e6
"""Damage of an option whose weights or prediction are not finite: far above any real one."""

Progress = Callable[[int, int], None]
Curvature = Callable[[LayerSpec], LayerCurvature]
Fill = Callable[[Mapping[str, Sequence[Scheme]]], Generator[str, None, None]]
"""Compresses layers into the bank, naming each that is done: `Driver.fill`."""


def build_option_table(
    space: SearchSpace,
    layout: ModelLayout,
    bank: Bank,
    *,
    curvature: Curvature,
    cost: CostModel,
    weights: Mapping[str, Tensor],
    fill: Fill | None = None,
    probe: Probe | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> OptionTable:
    """Predicted damage and additive costs of every option.

    The damage of an option of several layers is the sum of theirs (see `_of_choice`). An option
    that is not finite gets `NOT_FINITE` and is named in a warning.

    Args:
        space: what may be chosen.
        layout: of the model.
        bank: of the model; filled.
        curvature: of a layer, e.g. `CurvatureStore.get`.
        cost: of the model.
        weights: base weights (o, d) by layer name.
        fill: asked to compress what the bank may lack, unless a finished table is found; None
            compresses in this process, when a damage is computed.
        probe: corrects the predictions, see `search.probe`; None leaves them as they are.
        cache: folder of finished tables; None to build anew. A table that cannot be read is built
            again, one that cannot be written is returned all the same, each with a warning.
        progress: told how many of all layer × option are done.
    """
    key = _key(space, layout, bank, curvature, cost, probe=probe)
    path = None if cache is None else cache / f"{key}.json"
    table = None if path is None else _read(path, space)
    if table is None:
        damages_of = partial(_damages, bank, curvature, weights)
        found = _by_layer(space, layout, damages_of, fill or _on_demand, progress)
        parts = [_of_choice(choice, layout, found) for choice in space.choices]
        weighed = [part[_WEIGHTS] for part in parts]
        if probe is not None:
            schemes = schemes_to_compress(space, layout)
            errors = partial(weight_errors, bank, weights, schemes)
            probed = _probed(probe, space, layout, weighed, schemes=schemes, errors=errors)
            path, weighed = (None, weighed) if probed is None else (path, probed)
        damage = tuple(
            np.minimum(of_weights + part[_INPUTS], NOT_FINITE)
            for of_weights, part in zip(weighed, parts, strict=True)
        )
        table = _table(space, layout, damage, option_costs(space, layout, cost))
        if path is not None:
            _write(path, table)
    return table


def schemes_to_compress(space: SearchSpace, layout: ModelLayout) -> dict[str, tuple[Scheme, ...]]:
    """What the damages of a space's options are computed from, by layer name, largest layer first.

    Whole schemes or single stages, see `MOST_EXACT`; each once, the base left out.
    """
    asked = {
        name: tuple(dict.fromkeys(part for parts in _summands(schemes) for part in parts))
        for name, schemes in _options(space).items()
    }

    def n_weights(name: str) -> int:
        layer = layout.layer(name)
        return layer.out_features * layer.in_features

    return {name: asked[name] for name in sorted(asked, key=n_weights, reverse=True) if asked[name]}


def _options(space: SearchSpace) -> dict[str, list[Scheme]]:
    """The schemes of each searched layer, one per option of its choice."""
    return {
        name: [option.schemes[index] for option in choice.options]
        for choice in space.choices
        for index, name in enumerate(choice.layers)
    }


def _summands(schemes: Sequence[Scheme]) -> list[tuple[Scheme, ...]]:
    """For each scheme of a layer those whose damages add up to its own; none for the base."""

    def summands(scheme: Scheme) -> tuple[Scheme, ...]:
        kinds = {METHODS[stage.method].kind for stage in scheme.stages}
        if len(schemes) > MOST_EXACT and kinds <= _ADDS_UP:
            return tuple(Scheme((stage,)) for stage in scheme.stages)
        return () if scheme.is_base else (scheme,)

    return list(map(summands, schemes))


def _on_demand(wanted: Mapping[str, Sequence[Scheme]]) -> Generator[str, None, None]:
    """Fills nothing: what is not in the bank is compressed when it is asked for."""
    yield from wanted


def _by_layer(
    space: SearchSpace,
    layout: ModelLayout,
    damages_of: Callable[[LayerSpec, Sequence[Scheme]], Iterator[tuple[float, float]]],
    fill: Fill,
    progress: Progress | None,
) -> dict[str, Floats]:
    """Both damages of each layer under each option of its choice, as soon as it is filled."""
    options = _options(space)
    total, done = sum(map(len, options.values())), 0
    found: dict[str, Floats] = {}
    with closing(fill(schemes_to_compress(space, layout))) as filled:
        for name in chain(filled, options):
            if name in found:
                continue
            found[name] = np.zeros((2, len(options[name])))
            for level, both in enumerate(damages_of(layout.layer(name), options[name])):
                found[name][:, level] = both
                done += 1
                if progress is not None:
                    progress(done, total)
    return found


def _of_choice(choice: Choice, layout: ModelLayout, found: Mapping[str, Floats]) -> Floats:
    """Both damages of the options of a choice, (2, options); those of its layers add up."""
    damage = np.zeros((2, len(choice.options)))
    for level, option in enumerate(choice.options):
        for name in _counted(choice, option, layout):
            damage[:, level] += found[name][:, level]
    return damage


def _counted(choice: Choice, option: Option, layout: ModelLayout) -> Sequence[str]:
    """The layers of a choice whose errors count under an option.

    Where all are dropped, only those whose outputs leave the part: what the others put out meets
    zeros.
    """
    last = [name for name in choice.layers if layout.layer(name).role in READERS]
    dropped = last and all(map(drops, option.schemes))
    return last if dropped else choice.layers


def _damages(
    bank: Bank,
    curvature: Curvature,
    weights: Mapping[str, Tensor],
    layer: LayerSpec,
    schemes: Sequence[Scheme],
) -> Iterator[tuple[float, float]]:
    """What a layer damages under each scheme: by errors of its weight, by rounding its inputs.

    One decoded matrix is in memory at a time.
    """
    found = curvature(layer)
    weight = weights[layer.name]

    @cache
    def exact(scheme: Scheme) -> tuple[float, float]:
        packed = bank.packed(layer.name, scheme).to(weight.device)
        dense = _decoded(packed, weight)
        both = predicted_damage(weight, dense, found), _of_inputs(dense, packed, found)
        return _finite(both, layer, scheme)

    for parts in _summands(schemes):
        of_weights, of_inputs = zip((0.0, 0.0), *map(exact, parts), strict=True)
        yield sum(of_weights), sum(of_inputs)


def _decoded(packed: CompressedWeight, weight: Tensor) -> Tensor:
    """The matrix (o, d) that takes the place of `weight`, float32 as search-time forwards decode.

    A 16-bit base would round once more. Rows that nothing reads stay as they are: what reads them
    says what it loses.
    """
    dense = decode(packed.tensors, packed.scheme, packed.shape, torch.float32).to(weight.device)
    unread = unread_rows(packed.tensors, packed.scheme, packed.shape)
    if unread is not None:
        dense[unread] = weight[unread].float()
    return dense


def weight_errors(
    bank: Bank, weights: Mapping[str, Tensor], schemes: Mapping[str, Sequence[Scheme]], name: str
) -> Iterator[Tensor]:
    """``dense - weight`` of a layer under each of its schemes, (o, d) float32."""
    weight = weights[name]
    for scheme in schemes[name]:
        yield _decoded(bank.packed(name, scheme).to(weight.device), weight).sub_(weight)


def _probed(
    probe: Probe,
    space: SearchSpace,
    layout: ModelLayout,
    predicted: Sequence[Floats],
    *,
    schemes: Mapping[str, Sequence[Scheme]],
    errors: ErrorsOf,
) -> list[Floats] | None:
    """Damages by errors of weights as a probe corrects them, for each choice; None if it fails."""
    if not schemes:
        return list(predicted)
    slopes = probe.measure({name: len(found) for name, found in schemes.items()}, errors)
    if slopes is None:
        return None
    columns = {
        (name, scheme): slopes.by_layer[name][:, place].numpy()
        for name, found in schemes.items()
        for place, scheme in enumerate(found)
    }
    summands = {name: _summands(offered) for name, offered in _options(space).items()}

    def along(choice: Choice, level: int) -> Floats:
        names = _counted(choice, choice.options[level], layout)
        parts = [columns[name, part] for name in names for part in summands[name][level]]
        return sum(parts, np.zeros(slopes.n_samples))

    places = [(choice, level) for choice in space.choices for level in range(len(choice.options))]
    damages = corrected(
        np.concatenate(predicted),
        np.column_stack([along(choice, level) for choice, level in places]),
        slopes.n_units,
        [group_of(layout.layer(c.layers[0]).role, c.options[level].schemes) for c, level in places],
    )
    return np.split(damages, np.cumsum([len(choice.options) for choice in space.choices])[:-1])


def _of_inputs(dense: Tensor, packed: CompressedWeight, found: LayerCurvature) -> float:
    """Damage because a scheme rounds the layer's inputs; 0 if it does not."""
    if found.rows is None or found.hessian is None:
        return 0.0
    errors = input_errors(dense, found.hessian.to(dense), packed.tensors, packed.scheme)
    return (
        0.0
        if errors is None
        else 0.5 * float(found.rows.double().to(errors.device) @ errors.double())
    )


def _finite(both: tuple[float, float], layer: LayerSpec, scheme: Scheme) -> tuple[float, float]:
    if all(map(math.isfinite, both)):
        return both
    _log.warning(
        "The predicted damage of layer %r under %s is not finite; it counts as %g.",
        layer.name,
        scheme,
        NOT_FINITE,
    )
    return NOT_FINITE, 0.0


def _table(
    space: SearchSpace, layout: ModelLayout, damage: PerChoice, costs: OptionCosts
) -> OptionTable:
    return OptionTable(
        names=tuple(choice.name for choice in space.choices),
        roles=tuple(layout.layer(choice.layers[0]).role for choice in space.choices),
        depths=tuple(_depth(layout, choice) for choice in space.choices),
        labels=tuple(tuple(option.label for option in choice.options) for choice in space.choices),
        damage=damage,
        costs=costs.added,
        fixed=costs.fixed,
    )


def _depth(layout: ModelLayout, choice: Choice) -> float:
    """Place of a choice along the blocks, 0 to 1; -1 before them, 2 after them."""
    layer = layout.layer(choice.layers[0])
    if layer.block is not None:
        return layer.block / max(1, len(layout.blocks) - 1)
    return -1.0 if layer.kind == "embedding" else 2.0


def bank_entries(bank: Bank, space: SearchSpace) -> list[str]:
    """Digests of the compressed weights of all options, base options left out."""
    return [
        bank.path(name, option.schemes[index]).stem
        for choice in space.choices
        for index, name in enumerate(choice.layers)
        for option in choice.options
        if not option.schemes[index].is_base
    ]


def _key(
    space: SearchSpace,
    layout: ModelLayout,
    bank: Bank,
    curvature: Curvature,
    cost: CostModel,
    *,
    probe: Probe | None,
) -> str:
    """Of all that a table depends on; a bank entry's name says weight, statistics and code."""
    entries = bank_entries(bank, space)
    layers = [curvature(layout.layer(name)).digest for name in space.searched_layers]
    device = [cost.profile.to_json(), cost.tokens_per_pass]
    others = [cost.other_bytes, cost.other_macs_per_token]
    model = [layer.to_json() for layer in cost.layers]
    labels = [[option.label for option in choice.options] for choice in space.choices]
    probed = None if probe is None else probe.key
    parts = [_FORMAT, space.digest, labels, entries, layers, device, others, model, probed]
    return digest(parts)


def _read(path: Path, space: SearchSpace) -> OptionTable | None:
    try:
        table = OptionTable.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("The option table %s is damaged and is built again: %s.", path, error)
        return None
    return table if table.names == tuple(choice.name for choice in space.choices) else None


def _write(path: Path, table: OptionTable) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(table.to_json(), allow_nan=False))
    except OSError as error:
        _log.warning("The option table %s cannot be kept: %s.", path, error)
