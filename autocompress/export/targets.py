"""Where a compressed model is to run, and what a search space must leave out for that.

A target is an export format and the rules of the programs that read it. Imports no torch before a
space is restricted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from autocompress.core import LayerSpec, Scheme, Stage
from autocompress.core.errors import SpaceError, UsageError
from autocompress.core.registry import Registry
from autocompress.core.scheme import BASE_SCHEME
from autocompress.export.compressed_tensors import group_scheme
from autocompress.export.formats import EXPORTERS
from autocompress.spaces import Choice, Option, SearchSpace, load_space
from autocompress.spaces.schema import Ties

if TYPE_CHECKING:
    from autocompress.models import BaseModel

Rule = Callable[[LayerSpec, Scheme], str]

_GROUP_SIZE = "group_size"
_USUAL_GROUP = 128
_FINEST = 32
"""The smallest group size that all targets run; smaller ones cost more bytes than they save."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where compressed models run.

    Attributes:
        name: what ``--target`` says.
        summary: one line.
        exporter: name of the export format that it reads; empty: any.
        rule: why it cannot run a layer under a scheme that the format holds; empty if it can.
        fused: layers of a block that read one input run as one, so they must share a scheme.
    """

    name: str
    summary: str
    exporter: str = ""
    rule: Rule | None = None
    fused: bool = False

    def refusal(self, layer: LayerSpec, scheme: Scheme) -> str:
        """Why it cannot run `layer` under `scheme`; empty if it can."""
        if scheme.is_base or not self.exporter:
            return ""
        refused = EXPORTERS[self.exporter].refusal(layer, scheme)
        return refused or ("" if self.rule is None else self.rule(layer, scheme))


def space_for(
    target: str, space: str, base: BaseModel, routed: Mapping[str, int] = MappingProxyType({})
) -> SearchSpace:
    """The search space that a name or file gives on a model, without what `target` cannot run.

    Where trellis codes do not run, GPTQ's levels of the same width stand in their place. An option
    whose groups do not divide the rows gets finer ones if it runs with those. A choice that loses
    every option keeps the base.

    Args:
        target: name of a target.
        space: name of a shipped space, or the path of a YAML file.
        base: the model.
        routed: see `load_space`.

    Raises:
        UnknownNameError: there is no such target or shipped space.
        SpaceError: the file is malformed or does not fit the model, or nothing of it is left.
        UsageError: the target's format cannot hold the model at all, or a package of it is needed
            to tell.
    """
    chosen = TARGETS[target]
    if not chosen.exporter:
        return load_space(space, base.layout.layers, routed=routed)
    _require_model(chosen, base)
    ties = Ties() if chosen.fused else None
    whole = load_space(space, base.layout.layers, ties=ties, routed=routed)
    return restricted(whole, chosen, {layer.name: layer for layer in base.layout.layers})


def restricted(space: SearchSpace, target: Target, layers: Mapping[str, LayerSpec]) -> SearchSpace:
    """`space` without the options that `target` cannot run.

    Raises:
        SpaceError: nothing but the base is left.
    """
    choices = tuple(_restricted(choice, target, layers) for choice in space.choices)
    if all(option.is_base for c in choices for option in c.options):
        raise SpaceError(
            f"A space must offer something that the target {target.name} runs, but of "
            f"{space.name!r} nothing is left on this model. {_example(space, target, layers)}"
            "Next step: another --space (mixed_precision), or --target any."
        )
    before = sum(len(choice.options) for choice in space.choices)
    n_dropped = space.n_dropped + before - sum(len(choice.options) for choice in choices)
    return replace(space, choices=choices, n_dropped=n_dropped)


def _require_model(target: Target, base: BaseModel) -> None:
    reason = EXPORTERS[target.exporter].refusal_of_model(base)
    if not reason:
        return
    others = [name for name in TARGETS if _takes(TARGETS[name], base)]
    other = f"--target {' or '.join(others)}, which can, or " if others else ""
    raise UsageError(
        f"{target.exporter}, which the target {target.name} reads, cannot hold this model: "
        f"{reason} Next step: {other}--target any and then export --format packed, which holds "
        "every model."
    )


def _takes(target: Target, base: BaseModel) -> bool:
    """Whether a target's format is known to hold a model; one that cannot tell here is none."""
    try:
        return bool(target.exporter) and not EXPORTERS[target.exporter].refusal_of_model(base)
    except UsageError:
        return False


def _restricted(choice: Choice, target: Target, layers: Mapping[str, LayerSpec]) -> Choice:
    specs = [layers[name] for name in choice.layers]
    options: dict[tuple[Scheme, ...], Option] = {}
    for option in choice.options:
        found = _runnable(option, target, specs)
        if found is not None:
            options.setdefault(found.schemes, found)
    base = Option(str(BASE_SCHEME), (BASE_SCHEME,) * len(choice.layers), choice.base_bytes)
    ordered = sorted(options.values(), key=lambda option: option.storage_bytes)
    return replace(choice, options=tuple(ordered) or (base,))


def _runnable(option: Option, target: Target, specs: Sequence[LayerSpec]) -> Option | None:
    """The option as the target runs it: levels in place of trellis codes, then finer groups.

    Layers of 960 inputs have no groups of 128 in formats without a ragged last one, but of 64.
    """
    schemes = option.schemes
    while any(_refusals(schemes, target, specs)):
        nearer = tuple(map(_nearer, schemes))
        if nearer == schemes:
            return None
        schemes = nearer
    return option if schemes == option.schemes else _rewritten(option, schemes, specs)


def _nearer(scheme: Scheme) -> Scheme:
    """The scheme as more targets run it; itself if there is no such thing."""
    from autocompress.methods import canonical

    levels = _on_levels(scheme)
    return _with_finer_groups(scheme) if levels == scheme else canonical(levels)


def _on_levels(scheme: Scheme) -> Scheme:
    """The scheme with the levels of GPTQ, at the same width, in place of trellis codes."""
    return Scheme(tuple(map(_level_stage, scheme.stages)))


def _level_stage(stage: Stage) -> Stage:
    from autocompress.methods import METHODS, TrellisQuantizer

    if not isinstance(METHODS[stage.method], TrellisQuantizer):
        return stage
    return Stage.of("gptq", {"bits": dict(stage.options)["bits"], _GROUP_SIZE: _USUAL_GROUP})


def _with_finer_groups(scheme: Scheme) -> Scheme:
    """The scheme with half the group size, where that is not too fine for a target."""
    sizes = _group_sizes(scheme)
    halves = {m: size // 2 for m, size in sizes.items() if not size % 2 and size >= 2 * _FINEST}
    return _with_groups(scheme, halves)


def _group_sizes(scheme: Scheme) -> dict[str, int]:
    """By the name of a method that rounds to a grid in groups."""
    from autocompress.methods import METHODS, GridQuantizer

    grids = [s for s in scheme.stages if isinstance(METHODS[s.method], GridQuantizer)]
    return {s.method: int(dict(s.options)[_GROUP_SIZE]) for s in grids}


def _with_groups(scheme: Scheme, sizes: Mapping[str, int]) -> Scheme:
    return Scheme(
        tuple(
            s.with_options({_GROUP_SIZE: sizes[s.method]}) if s.method in sizes else s
            for s in scheme.stages
        )
    )


def _rewritten(option: Option, schemes: tuple[Scheme, ...], specs: Sequence[LayerSpec]) -> Option:
    """The option with other schemes, in its label too."""
    from autocompress.methods import footprint

    label = _with_groups(_on_levels(Scheme.parse(option.label)), _group_sizes(schemes[0]))
    pairs = zip(specs, schemes, strict=True)
    n_bytes = sum(footprint(layer, scheme).storage_bytes for layer, scheme in pairs)
    return Option(str(label), schemes, n_bytes)


def _refusals(
    schemes: Sequence[Scheme], target: Target, specs: Sequence[LayerSpec]
) -> Iterator[str]:
    for layer, scheme in zip(specs, schemes, strict=True):
        yield target.refusal(layer, scheme)


def _example(space: SearchSpace, target: Target, layers: Mapping[str, LayerSpec]) -> str:
    """Why one option was dropped, of a layer inside a block if there is one."""
    for choice in sorted(space.choices, key=lambda c: layers[c.layers[0]].block is None):
        specs = [layers[name] for name in choice.layers]
        for option in reversed(choice.options):
            reason = next(filter(None, _refusals(option.schemes, target, specs)), "")
            if reason:
                return f"For example {choice.name}: {reason} "
    return ""


_VLLM_BITS = (4, 8)
_VLLM_GROUPS = (32, 64, 128)


def _vllm(layer: LayerSpec, scheme: Scheme) -> str:
    """The rules of vLLM's loader of compressed-tensors beyond those of the format."""
    found = group_scheme(layer, scheme)
    if isinstance(found, str):
        return found
    if layer.role == "head":
        return "vLLM reads the output head as it is."
    if found.bits not in _VLLM_BITS:
        return f"vLLM has kernels for bits 4 and 8, but got {found.bits}."
    if not found.int8_inputs and layer.in_features * found.bits % 32:
        return (
            f"vLLM reads rows of whole 32-bit words, but {layer.in_features} inputs of "
            f"{found.bits} bits are none."
        )
    if found.group_size is not None and found.group_size not in _VLLM_GROUPS:
        near = min(_VLLM_GROUPS, key=lambda g: (abs(g - (found.group_size or 0)), -g))
        return (
            "vLLM has kernels for group_size 32, 64, 128 and 0 (the whole row), but got "
            f"{found.group_size}. The nearest legal value is {near}."
        )
    return ""


TARGETS: Registry[Target] = Registry("target")
for _target in (
    Target("any", "everything that the space offers"),
    Target(
        "transformers", "stock transformers with the compressed-tensors package",
        exporter="compressed-tensors",
    ),
    Target(
        "vllm", "vLLM: 4 and 8 bits and W8A8; query, key, value and gate, up share a scheme",
        exporter="compressed-tensors", rule=_vllm, fused=True,
    ),
    Target("llama.cpp", "llama.cpp: what a GGUF file holds exactly", exporter="gguf"),
    Target(
        "openvino", "OpenVINO on CPUs: integer codes, also in a rotated basis, and low rank",
        exporter="openvino",
    ),
):  # fmt: skip
    TARGETS.add(_target.name, _target)
