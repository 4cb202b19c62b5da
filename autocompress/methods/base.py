"""The contract of compression methods.

A method is a stateless object of one of the kinds below, in a file of its own, registered by
``@METHODS.register(name)``. It sees one layer as a `LayerProblem` and returns tensors; how they
are stored, counted and composed with other methods is not its business.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import IntEnum
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError, nearest
from autocompress.core.footprint import TensorLayout
from autocompress.core.registry import Registry
from autocompress.core.scheme import OptionValue, Stage
from autocompress.methods.coding import Coding, Damage, Quantized, Stored
from autocompress.methods.grid import GridCoding, GridOptions
from autocompress.methods.problem import LayerProblem, LayerStatistics

__all__ = [
    "METHODS",
    "Factorizer",
    "GridQuantizer",
    "InputQuantizer",
    "LayerStatistics",
    "Method",
    "Multiplier",
    "Needs",
    "Quantizer",
    "Residual",
    "Sparsifier",
    "SparsityOptions",
    "StageKind",
    "Transform",
]


class Needs(IntEnum):
    """What a method uses of the calibration statistics; it does without, less well."""

    NONE = 0
    DIAGONAL = 1
    HESSIAN = 2


class StageKind(IntEnum):
    """What a stage does; the stages of a scheme come in this order, at most one of each kind."""

    SHARE = 0
    WIDTH = 1
    TRANSFORM = 2
    FACTORIZE = 3
    SPARSIFY = 4
    QUANTIZE = 5
    RESIDUAL = 6
    INPUTS = 7


OptionsT = TypeVar("OptionsT")
GridT = TypeVar("GridT", bound=GridOptions)


class Method(ABC, Generic[OptionsT]):
    """A compression method.

    Attributes:
        kind: its place in a scheme.
        needs: the statistics it uses.
        options: frozen dataclass of its options, each with a default, of type bool, int, float or
            str; ``__post_init__`` raises `SchemeError` naming the field of a bad value.
        summary: one line for ``autocompress methods``.
        stronger: name of a method that takes the same options, stores the same and is better for
            more work; empty if there is none. See `strongest`.
        compiled: whether it takes many times as long without a C compiler.
    """

    kind: ClassVar[StageKind]
    needs: ClassVar[Needs]
    summary: ClassVar[str]
    stronger: ClassVar[str] = ""
    compiled: ClassVar[bool] = False
    options: type[OptionsT]

    def read_options(self, stage: Stage) -> OptionsT:
        """The options of `stage`, defaults filled in.

        Raises:
            SchemeError: an option is unknown, of the wrong type or out of range.
        """
        types = get_type_hints(self.options)
        values = {}
        for name, value in stage.options:
            if name not in types:
                raise SchemeError(
                    f"{stage.method} has no option {name!r} (in {stage}). {nearest(name, types)}"
                )
            values[name] = _typed(stage, name, value, types[name])
        try:
            return self.options(**values)
        except SchemeError as error:
            raise SchemeError(f"{stage}: {error}") from None

    def refusal(self, shape: tuple[int, int], options: OptionsT) -> str:  # noqa: ARG002
        """Why a matrix (o, d) cannot be compressed so: the rule, what was got, what is legal.

        Empty if it can; from the shape alone, so that a space is refused before it is searched.
        """
        return ""

    def needs_of(self, options: OptionsT) -> Needs:  # noqa: ARG002
        """The statistics that it uses under these options."""
        return self.needs

    def canonical(self, stage: Stage) -> Stage:
        """`stage` with every option spelled out."""
        options = self.read_options(stage)
        fields = dataclasses.fields(options)  # type: ignore[arg-type]  # by contract a dataclass
        return Stage.of(stage.method, {f.name: getattr(options, f.name) for f in fields})


class Transform(Method[OptionsT]):
    """Changes the basis of the layer's inputs: ``W x = (W T) (T^-1 x)``.

    The stages after it see ``W T`` and the statistics of ``T^-1 x``; what they make of it is
    multiplied by ``T^-1`` again, so that a row of the result depends on that row alone.
    """

    kind = StageKind.TRANSFORM

    @abstractmethod
    def layout(self, shape: tuple[int, int], options: OptionsT) -> dict[str, TensorLayout]:
        """Shapes and dtypes of what T is stored as; none if options alone give it."""

    @abstractmethod
    def fit(
        self,
        problem: LayerProblem,
        options: OptionsT,
        compressed: Callable[[LayerProblem], Tensor],
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """What T is stored as, and notes.

        Args:
            problem: in the layer's own basis.
            options: of this method.
            compressed: the stages after this one: the dense float32 matrix that they make of a
                problem in the new basis.
        """

    @abstractmethod
    def apply(self, problem: LayerProblem, stored: Stored, options: OptionsT) -> LayerProblem:
        """The problem in the new basis: ``W T`` and ``T^-1 H T^-T``."""

    @abstractmethod
    def undo(self, matrix: Tensor, stored: Stored, options: OptionsT) -> Tensor:
        """``M T^-1`` of a float32 matrix (rows, d) in the new basis."""

    @abstractmethod
    def inputs(self, rows: Tensor, stored: Stored, options: OptionsT) -> Tensor:
        """``T^-1 x`` of inputs (tokens, d) float32, one per row: what the stages after it see."""

    def inputs_of_kernels(self, rows: Tensor, stored: Stored, options: OptionsT) -> Tensor:
        """As `inputs`, in the fastest way: equal but for rounding, which may depend on n."""
        return self.inputs(rows, stored, options)

    @abstractmethod
    def inputs_back(self, rows: Tensor, stored: Stored, options: OptionsT) -> Tensor:
        """``T x``: the inverse of `inputs`."""

    def damage(
        self,
        stored: Stored,  # noqa: ARG002
        shape: tuple[int, int],  # noqa: ARG002
        options: OptionsT,  # noqa: ARG002
    ) -> Damage | None:
        """What is wrong with stored tensors whose floats are finite; None if they may be any."""
        return None

    def macs_per_token(self, shape: tuple[int, int], options: OptionsT) -> int:  # noqa: ARG002
        """What ``T^-1 x`` costs where the layer runs without decoding."""
        return 0


class Factorizer(Method[OptionsT]):
    """Writes the weight as a product of two thin matrices."""

    kind = StageKind.FACTORIZE

    @abstractmethod
    def rank(self, options: OptionsT) -> int:
        """Inner dimension of the product."""

    @abstractmethod
    def factorize(
        self, problem: LayerProblem, options: OptionsT
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """A (o, r) and B (r, d), float32, and notes; the compressed weight is A B."""


@dataclasses.dataclass(frozen=True, slots=True)
class SparsityOptions:
    """Options that every sparsifier has.

    Attributes:
        sparsity: share of the weights that become zero, above 0 and below 1.
    """

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            close = 0.05 if self.sparsity <= 0 else 0.95
            raise SchemeError(
                "sparsity must be above 0 and below 1, "
                f"but got {self.sparsity}. A legal value nearby is {close}."
            )


class Sparsifier(Method[OptionsT]):
    """Chooses the weights that become zero."""

    kind = StageKind.SPARSIFY

    @abstractmethod
    def n_kept(self, shape: tuple[int, int], options: OptionsT) -> int:
        """How many weights `mask` keeps in a matrix of `shape`: exact, from the shape alone."""

    @abstractmethod
    def mask(self, problem: LayerProblem, options: OptionsT) -> tuple[Tensor, tuple[str, ...]]:
        """(o, d) bool, True where the weight is kept, and notes."""

    def values(
        self,
        problem: LayerProblem,  # noqa: ARG002
        mask: Tensor,  # noqa: ARG002
        options: OptionsT,  # noqa: ARG002
    ) -> Tensor | None:
        """The kept weights after they made up for the pruned ones, (o, d) float32.

        None if they stay as they are. They are the target of the quantizer that follows.
        """
        return None


class Quantizer(Method[OptionsT]):
    """Replaces weights by short codes."""

    kind = StageKind.QUANTIZE

    @abstractmethod
    def coding(self, options: OptionsT) -> Coding:
        """What codes mean under these options."""

    @abstractmethod
    def quantize(self, problem: LayerProblem, mask: Tensor | None, options: OptionsT) -> Quantized:
        """The codes of a matrix; where `mask` is False the code is that of exactly zero.

        Args:
            problem: the target and its statistics; dense even where there is a mask, unless the
                sparsifier made up for the pruned weights itself.
            mask: (o, d) bool, True where the weight is kept; None keeps all. Always None if the
                coding is not maskable.
            options: of this method.
        """


class GridQuantizer(Quantizer[GridT]):
    """A quantizer to an integer grid."""

    def coding(self, options: GridT) -> Coding:
        """See `Quantizer.coding`; how codes are found is no part of what they mean."""
        return GridCoding(GridOptions(options.bits, options.group_size, options.symmetric))


@dataclasses.dataclass(frozen=True, eq=False)
class Multiplier:
    """How a layer multiplies by a part of its matrix.

    Attributes:
        apply: ``R x`` of inputs (n, d) float32, one per row: (n, o).
        n_bytes: memory that it holds beside the stored tensors.
    """

    apply: Callable[[Tensor], Tensor]
    n_bytes: int


class Residual(Method[OptionsT]):
    """Stores part of the weight apart: the rest is what the stages before it represent.

    Attributes:
        adds_to_any: it corrects whatever the stages before it make of the whole weight, so that
            layers which share those can each have one.
    """

    kind = StageKind.RESIDUAL
    adds_to_any: ClassVar[bool] = False

    @abstractmethod
    def layout(
        self, shape: tuple[int, int], options: OptionsT, dtype: str
    ) -> dict[str, TensorLayout]:
        """Shapes and dtypes of the part; `dtype` is that of plain values."""

    @abstractmethod
    def fit(
        self,
        problem: LayerProblem,
        options: OptionsT,
        compressed: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> tuple[dict[str, Tensor], Tensor, tuple[str, ...]]:
        """The stored part, the target (o, d) of the stages before, and notes.

        Args:
            problem: the weight and its statistics.
            options: of this method.
            compressed: the stages before this one: the dense float32 matrix that they make of a
                float32 target (o, d). Repeating the last target costs nothing.
            dtype: of plain values.
        """

    @abstractmethod
    def values(self, stored: Stored, shape: tuple[int, int], options: OptionsT) -> Tensor:
        """The part as a matrix (o, d), float32."""

    def multiplier(self, stored: Stored, shape: tuple[int, int], options: OptionsT) -> Multiplier:
        """Multiplies by the part; decodes it on every call, where there is no shorter way."""
        return Multiplier(lambda rows: rows @ self.values(stored, shape, options).T, 0)

    @abstractmethod
    def macs_per_token(self, shape: tuple[int, int], options: OptionsT) -> int:
        """What the part adds to the layer's multiply-accumulates."""

    def damage(
        self,
        stored: Stored,  # noqa: ARG002
        shape: tuple[int, int],  # noqa: ARG002
        options: OptionsT,  # noqa: ARG002
    ) -> Damage | None:
        """What is wrong with stored tensors whose floats are finite; None if they may be any."""
        return None

    def exact_inputs(self, stored: Stored, options: OptionsT) -> Tensor | None:  # noqa: ARG002
        """Indices of inputs that only this part reads, so that they stay as they are; None: none.

        The other inputs are quantized without regard to them.
        """
        return None


class InputQuantizer(Method[OptionsT]):
    """Rounds what the layer reads, while it runs; stores nothing."""

    kind = StageKind.INPUTS
    needs = Needs.NONE

    @abstractmethod
    def quantized(self, inputs: Tensor, options: OptionsT) -> Tensor:
        """What inputs (tokens, d) float32 become; each token by itself."""

    @abstractmethod
    def error(self, hessian: Tensor, options: OptionsT) -> Tensor:
        """Expected squared error of each input, (d,), estimated from H alone."""


METHODS: Registry[Method[Any]] = Registry("compression method", "autocompress.methods")


def _typed(stage: Stage, name: str, value: OptionValue, kind: type) -> OptionValue:
    """`value` as the type of its field, if that changes nothing: 4.0 for 4, 1 for 1.0 or true.

    Equal schemes must mean the same, and in Python 4 == 4.0 and 1 == True.
    """
    if type(value) is kind:
        return value
    is_number = kind is not str and not isinstance(value, str) and math.isfinite(value)
    if is_number and kind(value) == value:
        converted: OptionValue = kind(value)
        return converted
    wanted = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, kind.__name__)
    raise SchemeError(f"{stage.method}: {name} must be {wanted}, but got {value!r} (in {stage}).")
