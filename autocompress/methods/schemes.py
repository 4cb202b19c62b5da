"""Schemes as plans: options read, order checked, layers asked whether they can take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Generic, TypeVar

from autocompress.core.errors import SchemeError
from autocompress.core.layer import BLOCKS, Among, LayerSpec
from autocompress.core.scheme import Scheme, Stage
from autocompress.methods.base import (
    METHODS,
    Factorizer,
    InputQuantizer,
    Method,
    Needs,
    Quantizer,
    Residual,
    Sparsifier,
    StageKind,
    Transform,
)
from autocompress.methods.coding import Coding
from autocompress.methods.sharing import Sharing, Tie, names_of, read_numbers
from autocompress.methods.storage import RESIDUAL, MatrixStorage
from autocompress.methods.width import Width, reader_of

MethodT = TypeVar("MethodT", bound=Method[Any])
T = TypeVar("T")

_ORDER = ", ".join(kind.name.lower() for kind in StageKind)


@dataclass(frozen=True, eq=False)
class Step(Generic[MethodT]):
    """A method with its options read."""

    method: MethodT
    options: Any


@dataclass(frozen=True, eq=False)
class Plan:
    """A scheme ready to run; a step that the scheme does not have is None."""

    scheme: Scheme
    share: Step[Tie[Any]] | None = None
    width: Step[Width] | None = None
    transform: Step[Transform[Any]] | None = None
    factorize: Step[Factorizer[Any]] | None = None
    sparsify: Step[Sparsifier[Any]] | None = None
    quantize: Step[Quantizer[Any]] | None = None
    residual: Step[Residual[Any]] | None = None
    inputs: Step[InputQuantizer[Any]] | None = None

    @property
    def steps(self) -> tuple[Step[Any], ...]:
        """The steps that the scheme has, in order."""
        first = (self.share, self.width, self.transform, self.factorize)
        last = (self.sparsify, self.quantize, self.residual, self.inputs)
        return tuple(step for step in (*first, *last) if step is not None)

    @cached_property
    def inside(self) -> Plan:
        """What follows the change of width, which sees a smaller layer."""
        return self if self.width is None else plan(Scheme(self.scheme.stages[1:]))

    def narrow(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of that smaller layer."""
        step = self.width
        return shape if step is None else step.method.narrow(shape, step.options)

    @cached_property
    def sharing(self) -> Step[Any] | None:
        """The step that layers go through together."""
        return next((step for step in self.steps if isinstance(step.method, Sharing)), None)

    @cached_property
    def among(self) -> Among:
        """What layers that share belong to: blocks, or experts of one block."""
        return BLOCKS if self.sharing is None else self.sharing.method.among

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """Of the blocks, or experts, whose layers share; none if none do, or none is named yet."""
        if self.sharing is None:
            return ()
        return read_numbers(getattr(self.sharing.options, self.among), self.among)

    def is_shared(self, tensor: str) -> bool:
        """Whether layers that share store the tensor of that name once."""
        if self.sharing is None or tensor.startswith(RESIDUAL):
            return False
        return bool(self.sharing.method.is_shared(tensor))

    @property
    def coding(self) -> Coding | None:
        """Of the quantized matrices; None if they are stored as plain values."""
        step = self.quantize
        return None if step is None else step.method.coding(step.options)

    def matrices(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """Shape of each matrix that is sparsified and quantized, by the prefix of its tensors."""
        o, d = self.narrow(shape)
        if self.rank is None:
            return {"": (o, d)}
        return {"a.": (o, self.rank), "b.": (self.rank, d)}

    def storage(self, shape: tuple[int, int]) -> MatrixStorage:
        """How one of those matrices lies in a file."""
        sparsify = self.sparsify
        n_kept = None if sparsify is None else sparsify.method.n_kept(shape, sparsify.options)
        return MatrixStorage(shape, self.coding, n_kept)

    @property
    def rank(self) -> int | None:
        """Inner dimension of the factors; None if the layer is not factorized."""
        if self.factorize is None:
            return None
        return self.factorize.method.rank(self.factorize.options)


def canonical(scheme: Scheme) -> Scheme:
    """`scheme` with options validated and every default spelled out; equal meaning, equal value.

    Raises:
        SchemeError: an option is unknown or out of range, or the stages are out of order.
        UnknownNameError: a method is not registered.
    """
    return plan(scheme).scheme


def needs(scheme: Scheme) -> Needs:
    """The most that any stage uses of the statistics."""
    steps = plan(scheme).steps
    return max((step.method.needs_of(step.options) for step in steps), default=Needs.NONE)


def rounds_inputs(scheme: Scheme) -> bool:
    """True if layers under `scheme` round what they read."""
    return plan(scheme).inputs is not None


def shares(scheme: Scheme) -> bool:
    """True if layers go through a stage of `scheme` together."""
    return plan(scheme).sharing is not None


def drops(scheme: Scheme) -> bool:
    """True if `scheme` leaves nothing of a layer."""
    coding = plan(scheme).coding
    return coding is not None and not coding.stores_codes


def reader(name: str, scheme: Scheme) -> str | None:
    """Name of the layer that chooses which outputs of the layer `name` go; None if none go.

    Raises:
        SchemeError: the name holds no number of a block.
    """
    step = plan(scheme).width
    if step is None or not step.options.cuts_outputs:
        return None
    return reader_of(name, step.options)


def narrowed_layer(layer: LayerSpec, ready: Plan) -> LayerSpec:
    """The smaller layer that the stages after a change of width see."""
    o, d = ready.narrow((layer.out_features, layer.in_features))
    macs = layer.macs_per_token * o * d // layer.n_weights
    return replace(layer, out_features=o, in_features=d, macs_per_token=macs)


def sharing_layers(name: str, scheme: Scheme) -> tuple[str, ...]:
    """Names of the layers that go through `scheme` with `name`, the one that stores for all first.

    `name` alone if the scheme does not share.

    Raises:
        SchemeError: the scheme names other blocks, or experts, than that of the layer.
    """
    ready = plan(scheme)
    return (name,) if ready.sharing is None else names_of(name, ready.numbers, ready.among)


def is_shared(tensor: str, scheme: Scheme) -> bool:
    """Whether layers that share by `scheme` store the tensor of that name once."""
    return plan(scheme).is_shared(tensor)


def own_tensors(name: str, scheme: Scheme, tensors: Mapping[str, T]) -> dict[str, T]:
    """Those of a layer's tensors that it stores itself, not another one that it shares with."""
    if sharing_layers(name, scheme)[0] == name:
        return dict(tensors)
    return {tensor: value for tensor, value in tensors.items() if not is_shared(tensor, scheme)}


def require_whole(allocation: Mapping[str, Scheme]) -> None:
    """Refuse an allocation in which a layer shares with one that does not share with it.

    Raises:
        SchemeError: names both.
    """
    for name, scheme in allocation.items():
        if shares(scheme):
            for other in sharing_layers(name, scheme):
                if allocation.get(other) != scheme:
                    got = allocation.get(other) or "base"
                    raise SchemeError(
                        f"Layers that share have one scheme, but {name} has {scheme} and {other} "
                        f"has {got}. Give both the same."
                    )


def check(layer: LayerSpec, scheme: Scheme) -> None:
    """Make sure that `layer` can take `scheme`.

    Raises:
        SchemeError: as `canonical`, or the rank is not below break-even for this layer's shape.
    """
    try:
        ready = plan(scheme)
    except SchemeError as error:
        raise SchemeError(f"Layer {layer.name}: {error}") from None
    if ready.width is not None:
        _check_width(layer, ready, ready.width)
        check(narrowed_layer(layer, ready), ready.inside.scheme)
        return
    n_layers = len(sharing_layers(layer.name, scheme))
    if ready.rank is not None:
        stacked = ready.share is None  # else one matrix stands for all
        _check_rank(layer, scheme, ready.rank, n_layers if stacked else 1)
    if ready.inputs is not None and layer.kind == "embedding":
        raise SchemeError(
            f"Layer {layer.name} is an embedding: it reads token ids, which cannot be rounded (in "
            f"{scheme}). Leave {scheme.stages[-1].method} out."
        )
    whole = (layer.out_features, layer.in_features)
    for step in ready.steps:
        inner = step is ready.sparsify or step is ready.quantize
        for shape in ready.matrices(whole).values() if inner else (whole,):
            reason = step.method.refusal(shape, step.options)
            if reason:
                raise SchemeError(f"Layer {layer.name} ({shape[0]} x {shape[1]}): {reason}")


def _check_width(layer: LayerSpec, ready: Plan, step: Step[Width]) -> None:
    shape = layer.out_features, layer.in_features
    reason = step.method.refusal(shape, step.options)
    if layer.kind == "embedding":
        reason = (
            f"it is an embedding, which has no width inside. Leave {ready.scheme.stages[0]} out."
        )
    if reason:
        raise SchemeError(f"Layer {layer.name} ({shape[0]} x {shape[1]}): {reason}")
    reader(layer.name, ready.scheme)


def _check_rank(layer: LayerSpec, scheme: Scheme, rank: int, n_layers: int) -> None:
    """`n_layers` stacked layers, if they share the second factor."""
    o, d = n_layers * layer.out_features, layer.in_features
    largest = (o * d - 1) // (o + d)
    if largest < 1:
        raise SchemeError(
            f"Layer {layer.name} ({o} x {d}) is too small to factorize: factors of any rank hold "
            f"at least as many weights. Leave the factorization out of {scheme}."
        )
    if not 1 <= rank <= largest:
        raise SchemeError(
            f"Layer {layer.name} ({o} x {d}): rank must be at least 1 and below break-even "
            f"{o * d / (o + d):.1f}, where factors hold as many weights as the layer, but got "
            f"{rank} in {scheme}. The nearest legal value is {min(max(rank, 1), largest)}."
        )


@lru_cache(maxsize=65536)
def plan(scheme: Scheme) -> Plan:
    """Read the options of every stage and check their order; errors as `canonical`."""
    methods = [METHODS[stage.method] for stage in scheme.stages]
    stages = tuple(
        method.canonical(stage) for method, stage in zip(methods, scheme.stages, strict=True)
    )
    _check_order(stages, methods)
    steps = [(m, m.read_options(stage)) for m, stage in zip(methods, stages, strict=True)]
    ready = Plan(
        Scheme(stages),
        share=next((Step(m, o) for m, o in steps if isinstance(m, Tie)), None),
        width=next((Step(m, o) for m, o in steps if isinstance(m, Width)), None),
        transform=next((Step(m, o) for m, o in steps if isinstance(m, Transform)), None),
        factorize=next((Step(m, o) for m, o in steps if isinstance(m, Factorizer)), None),
        sparsify=next((Step(m, o) for m, o in steps if isinstance(m, Sparsifier)), None),
        quantize=next((Step(m, o) for m, o in steps if isinstance(m, Quantizer)), None),
        residual=next((Step(m, o) for m, o in steps if isinstance(m, Residual)), None),
        inputs=next((Step(m, o) for m, o in steps if isinstance(m, InputQuantizer)), None),
    )
    _check_zeros(ready)
    _check_sharing(ready)
    _check_alone(ready)
    return ready


def _check_sharing(ready: Plan) -> None:
    """What is fitted to one layer alone cannot go with what layers share."""
    if ready.sharing is None:
        return
    names = {METHODS[s.method].kind: s.method for s in ready.scheme.stages}
    sharing = next(s.method for s in ready.scheme.stages if isinstance(METHODS[s.method], Sharing))
    last = ready.quantize
    if last is not None and isinstance(last.method, Sharing):
        first = names.get(StageKind.SHARE) or names.get(StageKind.FACTORIZE)
        if first is not None:
            raise SchemeError(
                f"{names[StageKind.QUANTIZE]} quantizes layers that share, as they are, so it "
                f"cannot follow {first} (in {ready.scheme}). Leave one of the two out."
            )
    if ready.width is not None:
        raise SchemeError(
            f"{names[StageKind.WIDTH]} makes each layer another shape, so it cannot go with "
            f"{sharing}, which layers share (in {ready.scheme}). Leave one of the two out."
        )
    if ready.transform is not None:
        raise SchemeError(
            f"{names[StageKind.TRANSFORM]} gives each layer a basis of its own, so it cannot "
            f"precede {sharing}, which layers share (in {ready.scheme}). Leave one of the two out."
        )
    if ready.residual is not None and not ready.residual.method.adds_to_any:
        raise SchemeError(
            f"{names[StageKind.RESIDUAL]} takes weights away from the stages before it, so it "
            f"cannot follow {sharing}, which layers share (in {ready.scheme}). Take eora instead."
        )


def _check_alone(ready: Plan) -> None:
    """A layer of which nothing is left has nothing for other stages to do."""
    coding = ready.coding
    if coding is not None and not coding.stores_codes and len(ready.steps) > 1:
        stages = ready.scheme.stages
        quantize = next(s for s in stages if METHODS[s.method].kind is StageKind.QUANTIZE)
        raise SchemeError(
            f"{quantize} leaves nothing of the layer, so it stands alone, but got {ready.scheme}. "
            f"Write {quantize}, or leave it out."
        )


def _check_zeros(ready: Plan) -> None:
    """Pruned weights must be zero after quantization."""
    coding = ready.coding
    if ready.sparsify is not None and coding is not None and not coding.maskable:
        names = {METHODS[s.method].kind: s.method for s in ready.scheme.stages}
        raise SchemeError(
            f"{names[StageKind.QUANTIZE]} has no code for zero, so it cannot follow "
            f"{names[StageKind.SPARSIFY]}, whose zeros must stay zero (in {ready.scheme}). "
            "Quantize by rtn or gptq instead, or leave one of the two out."
        )


def _check_order(stages: tuple[Stage, ...], methods: list[Method[Any]]) -> None:
    kinds = [method.kind for method in methods]
    if len(set(kinds)) < len(kinds):
        names = " and ".join(stage.method for stage in stages)
        raise SchemeError(
            f"A scheme has at most one stage of each kind, but {names} hold two of one kind "
            f"({', '.join(kind.name.lower() for kind in kinds)}). Keep one of them."
        )
    if kinds != sorted(kinds):
        order = sorted(range(len(kinds)), key=kinds.__getitem__)
        right = Scheme(tuple(stages[i] for i in order))
        raise SchemeError(
            f"The stages of a scheme come in the order {_ORDER}, but got {Scheme(stages)}. "
            f"Write {right}."
        )
