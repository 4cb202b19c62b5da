"""The contract of kernels: how a packed layer multiplies without being decoded as a whole.

A kernel sees one matrix that is sparsified, quantized or factorized. Rounding of inputs and change
of basis act on the inputs alone (``y = C q(T^-1 x)``), so `Kernel.apply` does both before any
kernel multiplies; a kernel that rounds by itself says so. A residual adds a second matrix: only the
kernels that decode the whole layer take one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from autocompress.core.registry import Registry
from autocompress.core.scheme import Scheme
from autocompress.kernels.basis import Entrance, entrance
from autocompress.methods.schemes import Plan, plan
from autocompress.methods.storage import RESIDUAL, TRANSFORM, MatrixStorage, under

Stored = Mapping[str, Tensor]
"""Tensors of a layer as the file holds them, by name."""

StateT = TypeVar("StateT")


@dataclass(frozen=True, slots=True)
class Matrix:
    """What a kernel is asked to multiply by.

    Attributes:
        plan: the scheme, ready to run.
        shape: (out_features, in_features).
        dtype: what the layer computes in.
        device: where.
    """

    plan: Plan
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def storage(self) -> MatrixStorage:
        """How a matrix that is not factorized is stored."""
        return self.plan.storage(self.shape)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A layer as its kernel wants it.

    Attributes:
        matrix: what it is.
        entrance: takes inputs into the basis of the scheme's transform; None: it has none.
        exact: indices of inputs that are not rounded, as only the residual reads them; None: none.
        state: what the kernel made of the rest.
    """

    matrix: Matrix
    entrance: Entrance | None
    exact: Tensor | None
    state: Any

    def entered(self, inputs: Tensor, rounded: bool) -> Tensor:
        """Inputs (n, d) in the scheme's basis and, if `rounded`, rounded as it says."""
        rounding = self.matrix.plan.inputs if rounded else None
        if self.entrance is None and rounding is None:
            return inputs
        rows = inputs.float()
        if self.entrance is not None:
            rows = self.entrance(rows)
        if rounding is not None:
            whole, exact = rows, self.exact
            if exact is not None:
                rows = rows.index_fill(1, exact, 0.0)
            rows = rounding.method.quantized(rows, rounding.options)
            if exact is not None:
                rows = rows.index_copy(1, exact, whole[:, exact])
        return rows


class Kernel(ABC, Generic[StateT]):
    """One way to multiply by a packed matrix; stateless.

    Attributes:
        name: in `KERNELS` and in tables.
        form: kernels of one form share what they prepare; ``stored`` if they read the stored
            tensors.
        reads_stored: it goes on reading the stored tensors, whatever it holds beside them.
        chosen: False if it runs only where a user asks for it by name.
        rounds_inputs: it rounds the inputs itself, as the scheme says.
        takes_residuals: it computes the layer's residual as well.
    """

    name: ClassVar[str]
    form: ClassVar[str] = "stored"
    reads_stored: ClassVar[bool] = False
    chosen: ClassVar[bool] = True
    rounds_inputs: ClassVar[bool] = False
    takes_residuals: ClassVar[bool] = False

    def refusal(
        self, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, device: torch.device
    ) -> str:
        """Why it cannot run such a layer; empty if it can.

        Decided by shape, scheme, dtype and the operators that this torch has on `device`.
        """
        ready = plan(scheme)
        if ready.residual is not None and not self.takes_residuals:
            return "the scheme stores part of the weight apart (residual)"
        if ready.width is not None:
            return "the scheme changes the width of the layer: a kernel runs what is left of it"
        if ready.coding is not None and not ready.coding.stores_codes and not self.takes_residuals:
            return "the scheme stores nothing"
        return self.refuses(Matrix(ready, shape, dtype, device))

    def prepare(
        self,
        tensors: Stored,
        scheme: Scheme,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Prepared:
        """Repack a layer that `refusal` has nothing against; `tensors` are not written."""
        matrix = Matrix(plan(scheme), shape, dtype, device)
        with torch.no_grad():
            state = self.repack(tensors, matrix)
        return Prepared(matrix, _entrance(tensors, matrix), _exact_inputs(tensors, matrix), state)

    def extra_bytes(self, prepared: Prepared) -> int:
        """Memory that a prepared layer holds beyond its stored tensors."""
        return self.held_bytes(prepared.state)

    def apply(self, inputs: Tensor, prepared: Prepared) -> Tensor:
        """``x Wᵀ`` of inputs (n, d): (n, o) in the dtype of `inputs`."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.apply(inputs, prepared)
        entered = prepared.entered(inputs, rounded=not self.rounds_inputs)
        rows = entered if self.rounds_inputs else entered.to(inputs.dtype)
        return self.multiply(rows, prepared.state).to(inputs.dtype)

    @abstractmethod
    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:
        """Largest error of an output, as a share of ``sum_j |W_ij| |x_j|``.

        Against the layer decoded to float32 and multiplied in float32, for inputs in `dtype`; W and
        x in the basis of the scheme. On a grid with zero points ``|W_ij|`` counts as the largest of
        its row, because codes count as much as values.
        """

    @abstractmethod
    def refuses(self, matrix: Matrix) -> str:
        """As `refusal`, for the matrix without its residual."""

    @abstractmethod
    def repack(self, tensors: Stored, matrix: Matrix) -> StateT:
        """What `multiply` wants."""

    def held_bytes(self, state: StateT) -> int:  # noqa: ARG002
        """Bytes of `state` that are not shared with the stored tensors."""
        return 0

    @abstractmethod
    def multiply(self, rows: Tensor, state: StateT) -> Tensor:
        """Rows (n, d), in the compute dtype or float32, to (n, o) in any floating dtype."""


def _entrance(tensors: Stored, matrix: Matrix) -> Entrance | None:
    step = matrix.plan.transform
    if step is None:
        return None
    return entrance(step, under(TRANSFORM, tensors), matrix.shape[1], matrix.device)


def _exact_inputs(tensors: Stored, matrix: Matrix) -> Tensor | None:
    step = matrix.plan.residual
    if step is None:
        return None
    found = step.method.exact_inputs(under(RESIDUAL, tensors), step.options)
    return None if found is None else found.to(matrix.device)


KERNELS: Registry[Kernel[Any]] = Registry("kernel")


def add(kernel: Kernel[Any]) -> None:
    """Register a kernel under its name."""
    KERNELS.add(kernel.name, kernel)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What dense products are fastest in, for a layer that computes in `dtype`.

    bfloat16 on CPUs with AMX or AVX-512 BF16; float32 on other CPUs, whose 16-bit products are
    several times slower; on a GPU the layer's own.
    """
    if device.type != "cpu":
        return dtype
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    is_fast = any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return torch.bfloat16 if is_fast and dtype != torch.float16 else torch.float32


def rounding(*dtypes: torch.dtype) -> float:
    """Largest relative error of rounding once to each of `dtypes`, and of the products' sums."""
    return sum(torch.finfo(dtype).eps / 2 for dtype in dtypes) + 2e-5


def has_operator(name: str, device: torch.device) -> bool:
    """True if torch has ``aten::name`` for `device`; an import never asks."""
    if getattr(torch.ops.aten, name, None) is None:
        return False
    key = device.type.upper()
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key))


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)
