"""Schemes as plans: options read, order checked, layers asked whether they can take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from autocompress.core.errors import SchemeError
from autocompress.core.layer import LayerSpec
from autocompress.core.scheme import Scheme, Stage
from autocompress.methods.base import (
    METHODS,
    Factorizer,
    Method,
    Needs,
    Quantizer,
    Sparsifier,
)

MethodT = TypeVar("MethodT", bound=Method[Any])


@dataclass(frozen=True, eq=False)
class Step(Generic[MethodT]):
    """A method with its options read."""

    method: MethodT
    options: Any


@dataclass(frozen=True, eq=False)
class Plan:
    """A scheme ready to run; a step that the scheme does not have is None."""

    scheme: Scheme
    factorize: Step[Factorizer[Any]] | None = None
    sparsify: Step[Sparsifier[Any]] | None = None
    quantize: Step[Quantizer[Any]] | None = None

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
    return max((METHODS[stage.method].needs for stage in scheme.stages), default=Needs.NONE)


def check(layer: LayerSpec, scheme: Scheme) -> None:
    """Make sure that `layer` can take `scheme`.

    Raises:
        SchemeError: as `canonical`, or the rank is not below break-even for this layer's shape.
    """
    try:
        rank = plan(scheme).rank
    except SchemeError as error:
        raise SchemeError(f"Layer {layer.name}: {error}") from None
    if rank is None:
        return
    o, d = layer.out_features, layer.in_features
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
    return Plan(
        Scheme(stages),
        factorize=next((Step(m, o) for m, o in steps if isinstance(m, Factorizer)), None),
        sparsify=next((Step(m, o) for m, o in steps if isinstance(m, Sparsifier)), None),
        quantize=next((Step(m, o) for m, o in steps if isinstance(m, Quantizer)), None),
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
            "The stages of a scheme come in the order factorize, sparsify, quantize, but got "
            f"{Scheme(stages)}. Write {right}."
        )
