"""A space file and the layers of a model make a search space. The one place that knows methods."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from autocompress.core.errors import SchemeError, SpaceError, UsageError, nearest
from autocompress.core.layer import BLOCKS, EXPERTS, Among, ExpertOf, LayerSpec
from autocompress.core.scheme import OptionValue, Scheme, Stage
from autocompress.methods import (
    METHODS,
    Sharing,
    StageKind,
    canonical,
    check,
    drops,
    footprint,
    written_numbers,
)
from autocompress.spaces.catalog import SpaceFile
from autocompress.spaces.expand import WrittenOption, expand
from autocompress.spaces.match import TiedLayers, match
from autocompress.spaces.schema import Ties
from autocompress.spaces.space import Choice, Option, SearchSpace
from autocompress.spaces.widths import check_width, width_options, width_stage, without_counts

_LOG = logging.getLogger(__name__)

RATIO = "parameter_ratio"
RANK_MULTIPLE = 8
"""Ranks are multiples of this where that leaves at least two multiples: kernels want it."""


def resolve(
    file: SpaceFile, layers: Sequence[LayerSpec], routed: Mapping[str, int] = MappingProxyType({})
) -> SearchSpace:
    """The search space that a file gives on a model.

    Args:
        file: what `catalog.find_space` read.
        layers: all compressible layers of the model, in execution order.
        routed: see `match.match`.

    Raises:
        SpaceError: a method or option is unknown, a scheme does not fit a layer, or a choice
            selects nothing (see `match.match`).
    """
    spec = file.spec
    written = [expand(choice.options, file.source, i) for i, choice in enumerate(spec.choices)]
    for choice, options in zip(spec.choices, written, strict=True):
        for option in options:
            _check_written(option)
            _check_span(option, choice.span)
            check_width(option, spec.ties)
    resolver = _Resolver()
    tied = match(file, layers, routed)
    _check_experts(file, tied, written)
    choices = tuple(resolver.choice(members, written[members.choice]) for members in tied)
    if not choices:
        raise SpaceError(
            f"{file.source.name}: a space must select at least one layer, but none of the "
            f"{len(layers)} layers of the model is in it. "
            f"The model has these roles: {', '.join(sorted({layer.role for layer in layers}))}."
        )
    return SearchSpace(spec.name, spec.description, choices, resolver.n_dropped, resolver.n_merged)


def rank_for(ratio: float, layer: LayerSpec, n_layers: int = 1) -> int | None:
    """The rank whose two factors keep at most `ratio` of the layer's parameters.

    A factorization of rank r holds r·(o + d) of o·d parameters, so r = ratio·o·d / (o + d),
    rounded down; from 16 on to a multiple of 8. Of `n_layers` that share the second factor it is
    that of the stacked matrix, (n·o, d).

    Returns:
        None if no useful rank exists: below 1, or at or above break-even.
    """
    o, d = n_layers * layer.out_features, layer.in_features
    rank = int(ratio * o * d / (o + d))
    if rank >= 2 * RANK_MULTIPLE:
        rank -= rank % RANK_MULTIPLE
    return rank if rank >= 1 and rank * (o + d) < o * d else None


@dataclass(frozen=True)
class _Fitted:
    scheme: Scheme
    storage_bytes: int


class _Resolver:
    """Resolves options per shape, not per layer: a model has few shapes and many layers."""

    def __init__(self) -> None:
        self.n_dropped = 0
        self.n_merged = 0
        self._fitted: dict[tuple[WrittenOption, LayerSpec], _Fitted | None] = {}

    def choice(self, tied: TiedLayers, written: Sequence[WrittenOption]) -> Choice:
        options: dict[tuple[Scheme, ...], Option] = {}
        for option in written:
            fitted = [self._fit(option, layer, tied) for layer in tied.layers]
            useful = [f for f in fitted if f is not None]
            if len(useful) < len(fitted):
                self.n_dropped += 1
                _LOG.debug(
                    "%s: %s has no useful rank, or none to share with", tied.name, option.label
                )
                continue
            schemes = tuple(f.scheme for f in useful)
            if schemes in options:
                self.n_merged += 1
                _LOG.debug("%s: %s repeats %s", tied.name, option.label, options[schemes].label)
                continue
            n_bytes = sum(f.storage_bytes for f in useful)
            options[schemes] = Option(option.label, schemes, n_bytes)
        if not options:
            raise SpaceError(
                f"{written[0].where}: a choice must leave at least one option, but every rank is "
                f"below 1 or at or above break-even for {tied.name!r} "
                f"({tied.layers[0].out_features} x {tied.layers[0].in_features}), or it has no "
                "other block or expert to share with, or it must leave enough experts. Add the "
                "option base, or another ratio."
            )
        base_bytes = sum(layer.base_bytes for layer in tied.layers)
        kept = self._worth_a_trial(options.values(), tied.name, base_bytes)
        return Choice(
            name=tied.name,
            layers=tuple(layer.name for layer in tied.layers),
            options=tuple(sorted(kept, key=lambda option: option.storage_bytes)),
            base_bytes=base_bytes,
        )

    def _worth_a_trial(
        self, options: Collection[Option], name: str, base_bytes: int
    ) -> list[Option]:
        """Without those that only round, and store no less than the base that is offered too."""
        if not any(option.is_base for option in options):
            return list(options)
        kept = []
        for option in options:
            if _only_rounds(option) and option.storage_bytes >= base_bytes:
                self.n_dropped += 1
                _LOG.debug("%s: %s stores no less than the base", name, option.label)
            else:
                kept.append(option)
        return kept

    def _fit(self, option: WrittenOption, layer: LayerSpec, tied: TiedLayers) -> _Fitted | None:
        """On one of the tied layers; None if it cannot take the option."""
        if layer.expert is not None and _drops(option) and not _may_drop(tied):
            return None
        width = width_stage(option)
        if width is not None:
            part = [other for other in tied.layers if other.block == layer.block]
            given = width_options(width, layer, part, option.where)
            if given is None:
                return None
            option = _with_width(option, width, given)  # now it says all of the layer
        among = _sharing_among(option)
        if among is not None:
            numbers = tied.sharing(layer, among)
            return _fit(option, layer, numbers) if numbers else None
        key = option, replace(layer, name="", block=None, input_name=None, aliases=())
        if key not in self._fitted:
            self._fitted[key] = _fit(option, layer, ())
        return self._fitted[key]


def _fit(option: WrittenOption, layer: LayerSpec, numbers: tuple[int, ...]) -> _Fitted | None:
    """The option on one layer; None if a ratio resolves to no useful rank."""
    scheme = _with_ranks(option, layer, numbers)
    if scheme is None:
        return None
    try:
        scheme = canonical(scheme)
        check(layer, scheme)
        return _Fitted(scheme, footprint(layer, scheme).storage_bytes)
    except SchemeError as error:
        raise SpaceError(f"{option.where}: {option.label} does not fit: {error}") from error


def _only_rounds(option: Option) -> bool:
    """Whether weights are rounded, and nothing else: what is computed stays the same."""
    stages = [stage for scheme in option.schemes for stage in scheme.stages]
    return bool(stages) and all(METHODS[s.method].kind is StageKind.QUANTIZE for s in stages)


def _with_width(
    option: WrittenOption, width: Stage, given: Mapping[str, OptionValue]
) -> WrittenOption:
    """The option with what its change of width means for a layer: nothing if nothing is given."""
    changed = (without_counts(width).with_options(given),) if given else ()
    others = tuple(stage for stage in option.scheme.stages if stage is not width)
    return replace(option, scheme=Scheme((*changed, *others)))


def _with_ranks(option: WrittenOption, layer: LayerSpec, numbers: tuple[int, ...]) -> Scheme | None:
    """The scheme with ranks for ratios, and the blocks, or experts, that share."""
    stages: list[Stage] = []
    for written in option.scheme.stages:
        stage, n_layers = written, 1
        if _is_sharing(written):
            names: dict[str, OptionValue] = {_among(written): written_numbers(numbers)}
            stage, n_layers = written.with_options(names), len(numbers)
        ratio = _ratio(stage)
        if ratio is not None:
            rank = rank_for(ratio, layer, n_layers)
            if rank is None:
                return None
            stage = _with_rank(stage, rank)
        stages.append(stage)
    return Scheme(tuple(stages))


def _is_sharing(stage: Stage) -> bool:
    return isinstance(METHODS[stage.method], Sharing)


def _among(stage: Stage) -> Among:
    """What the layers belong to that a stage is shared by."""
    method = METHODS[stage.method]
    assert isinstance(method, Sharing)  # callers have checked
    return method.among


def _sharing_among(option: WrittenOption) -> Among | None:
    return next((_among(stage) for stage in option.scheme.stages if _is_sharing(stage)), None)


def _drops(option: WrittenOption) -> bool:
    stages = [without_counts(stage) for stage in option.scheme.stages if _ratio(stage) is None]
    return any(drops(Scheme((stage,))) for stage in stages)


def _may_drop(tied: TiedLayers) -> bool:
    """Whether the parts before, whose experts are used more, leave each token enough of them."""
    return tied.n_before >= _expert(tied).per_token


def _ratio(stage: Stage) -> float | None:
    value = dict(stage.options).get(RATIO)
    return float(value) if isinstance(value, int | float) else None


def _with_rank(stage: Stage, rank: int) -> Stage:
    others = tuple((name, value) for name, value in stage.options if name != RATIO)
    return Stage(stage.method, others).with_options({"rank": rank})


def _check_written(option: WrittenOption) -> None:
    """Methods, options and ratios that no layer could take; needs no model."""
    try:
        for i, stage in enumerate(option.scheme.stages):
            kind = METHODS[stage.method].kind
            _check_key(option, stage, kind, option.stage_keys[i] if option.stage_keys else None)
            _check_ratio(option, stage, kind)
        some_rank = [_with_rank(s, 1) if _ratio(s) else s for s in option.scheme.stages]
        canonical(Scheme(tuple(map(without_counts, some_rank))))
    except SpaceError:
        raise
    except UsageError as error:  # an unknown method, an unknown option or a bad value
        raise SpaceError(f"{option.where}: {error}") from error


def _check_key(option: WrittenOption, stage: Stage, kind: StageKind, key: str | None) -> None:
    right = kind.name.lower()
    if key is not None and key != right:
        raise SpaceError(
            f"{option.where}.{key}: {stage.method!r} is a method of the kind {right!r}. "
            f"Write it under `{right}:`."
        )


def _check_span(option: WrittenOption, span: int) -> None:
    """Layers share within a choice that spans blocks, and the choice says which."""
    for stage in filter(_is_sharing, option.scheme.stages):
        among = _among(stage)
        if among == BLOCKS and span < 2:
            raise SpaceError(
                f"{option.where}: {stage.method!r} shares between layers of adjacent blocks, so "
                f"its choice must span at least two blocks, but got span {span}. Write `span: 2` "
                "into the choice."
            )
        if among in dict(stage.options):
            by = "the span of the choice" if among == BLOCKS else "ties.expert_groups"
            raise SpaceError(
                f"{option.where}: {by} says which {among} share, but {stage.method!r} also got "
                f"{among}. Leave {among} out."
            )


def _check_experts(
    file: SpaceFile, tied: Sequence[TiedLayers], written: Sequence[Sequence[WrittenOption]]
) -> None:
    """An expert is dropped as a whole and where others are left; experts of one part are merged."""
    ties = file.spec.ties
    for choice, options in enumerate(written):
        sets = [t for t in tied if t.choice == choice and t.layers[0].expert is not None]
        dropping = next(filter(_drops, options), None)
        if sets and dropping is not None:
            _check_dropping(dropping, sets, ties)
        merging = next((o for o in options if _sharing_among(o) == EXPERTS), None)
        if sets and merging is not None and ties.expert_groups == 0:
            raise SpaceError(
                f"{merging.where}: experts of one part are merged, but ties.expert_groups is 0: "
                "every expert is a part by itself. Write `ties: {expert_groups: N}`, N below the "
                f"number of experts, which is {_expert(sets[0]).n_experts}."
            )


def _check_dropping(option: WrittenOption, sets: Sequence[TiedLayers], ties: Ties) -> None:
    if not ties.whole_experts:
        raise SpaceError(
            f"{option.where}: an expert is dropped with all of its layers, but ties.whole_experts "
            "is false. Write `ties: {whole_experts: true}`."
        )
    if not any(map(_may_drop, sets)):
        expert = _expert(sets[0])
        raise SpaceError(
            f"{option.where}: the parts before one that is dropped must hold the "
            f"{expert.per_token} experts of each token, but ties.expert_groups is "
            f"{ties.expert_groups} for {expert.n_experts} experts. Write "
            f"`ties: {{expert_groups: {expert.n_experts}}}`, or leave the option out."
        )


def _expert(tied: TiedLayers) -> ExpertOf:
    expert = tied.layers[0].expert
    assert expert is not None  # callers have checked
    return expert


def _check_ratio(option: WrittenOption, stage: Stage, kind: StageKind) -> None:
    options = dict(stage.options)
    if RATIO not in options:
        return
    if kind is not StageKind.FACTORIZE:
        raise SpaceError(
            f"{option.where}: {RATIO} belongs to methods that factorize, but {stage.method!r} "
            f"is of the kind {kind.name.lower()!r}. {nearest(RATIO, ('sparsity', 'bits'))}"
        )
    ratio = options[RATIO]
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise SpaceError(
            f"{option.where}: {RATIO} is the share of parameters that is kept, above 0 and "
            f"below 1 (at 1 the factors are as large as the layer), but got {ratio!r}."
        )
    if "rank" in options:
        raise SpaceError(
            f"{option.where}: {stage.method!r} takes a rank or a {RATIO}, but got both. "
            "Keep the ratio if the space is for more than one shape."
        )
