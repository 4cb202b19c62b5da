"""Incoherence: rotate the layer's inputs so that no weight and no input stands out.

A randomized Hadamard rotation ``T = diag(signs) (C_m x H_n)``, d = m n with n the largest power of
two in d and C_m the orthonormal cosine matrix of the odd rest (QuIP#, Tseng et al. 2024, arXiv
2402.04396, section 3; QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, rotates between layers
instead, which costs nothing at run time but needs the whole model). T is orthogonal and follows
from the seed, so nothing is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from hashlib import shake_128
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Transform
from autocompress.methods.coding import Stored
from autocompress.methods.packing import unpack
from autocompress.methods.problem import LayerProblem, LayerStatistics

_AT_ONCE = 1 << 18  # elements: their passes stay in the caches
_AT_ONCE_ON_GPU = 1 << 24  # calls count there


@dataclass(frozen=True, slots=True)
class HadamardOptions:
    """Options of the rotation.

    Attributes:
        seed: of the signs.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise SchemeError(
                f"seed must not be negative, but got {self.seed}. The nearest legal value is 0."
            )


class Hadamard(Transform[HadamardOptions]):
    """Quantize in a randomly rotated basis of the inputs."""

    needs = Needs.NONE
    options = HadamardOptions
    summary = "rotate the inputs (randomized Hadamard), so that outliers spread over the group"

    def layout(
        self,
        shape: tuple[int, int],  # noqa: ARG002
        options: HadamardOptions,  # noqa: ARG002
    ) -> dict[str, TensorLayout]:
        """See `Transform.layout`; nothing."""
        return {}

    def fit(
        self,
        problem: LayerProblem,  # noqa: ARG002
        options: HadamardOptions,  # noqa: ARG002
        compressed: object,  # noqa: ARG002
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """See `Transform.fit`; nothing to find."""
        return {}, ()

    def apply(
        self,
        problem: LayerProblem,
        stored: Stored,  # noqa: ARG002
        options: HadamardOptions,
    ) -> LayerProblem:
        """See `Transform.apply`; the rotated problem is shared by all that follows it."""

        def rotated_problem() -> LayerProblem:
            weight = rotated(problem.weight, options.seed)
            if problem.hessian is None:
                return LayerProblem(weight, problem.statistics)
            half = rotated(problem.hessian.double(), options.seed)
            hessian = rotated(half.T.contiguous(), options.seed).float()
            digest = f"{problem.statistics.digest}.hadamard{options.seed}"
            moved = LayerStatistics((hessian + hessian.T) / 2, problem.n_tokens, digest)
            return LayerProblem(weight, moved)

        return problem.derived(("hadamard", options.seed), rotated_problem)

    def undo(
        self,
        matrix: Tensor,
        stored: Stored,  # noqa: ARG002
        options: HadamardOptions,
    ) -> Tensor:
        """See `Transform.undo`."""
        return rotated_back(matrix, options.seed)

    def inputs(
        self,
        rows: Tensor,
        stored: Stored,  # noqa: ARG002
        options: HadamardOptions,
    ) -> Tensor:
        """See `Transform.inputs`; T is orthogonal."""
        return rotated(rows, options.seed)

    def inputs_of_kernels(
        self,
        rows: Tensor,
        stored: Stored,  # noqa: ARG002
        options: HadamardOptions,
    ) -> Tensor:
        """See `Transform.inputs_of_kernels`; two small products instead of log2(n) passes."""
        left, right, signs = factors(rows.shape[1], options.seed, rows.dtype, rows.device)
        parts = (rows * signs).view(-1, len(left), len(right))
        return (left @ (parts @ right)).view(rows.shape)

    def inputs_back(self, rows: Tensor, stored: Stored, options: HadamardOptions) -> Tensor:
        """See `Transform.inputs_back`."""
        return self.undo(rows, stored, options)

    def macs_per_token(
        self,
        shape: tuple[int, int],
        options: HadamardOptions,  # noqa: ARG002
    ) -> int:
        """See `Transform.macs_per_token`; an addition counts as one."""
        n, m = _power_and_rest(shape[1])
        return shape[1] * (int(math.log2(n)) + (m if m > 1 else 0))


def rotated(matrix: Tensor, seed: int) -> Tensor:
    """``M T``, (rows, d) in the dtype of `matrix`."""
    return _turned(matrix, seed, False)


def rotated_back(matrix: Tensor, seed: int) -> Tensor:
    """``M T^-1`` = ``M T^T``."""
    return _turned(matrix, seed, True)


def signs_and_cosines(d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Signs (d,) int8 and C_m (m, m) float64, of which T is made with H_n, n = d / m."""
    return _signs(d, seed), _cosines(_power_and_rest(d)[1])


def _turned(matrix: Tensor, seed: int, back: bool) -> Tensor:
    found: Tensor = _Turn.apply(matrix, seed, back)  # type: ignore[no-untyped-call]
    return found


class _Turn(torch.autograd.Function):
    """``M T``, or ``M T^T``, and each is the backward of the other; a few rows at a time."""

    @staticmethod
    def forward(ctx: FunctionCtx, matrix: Tensor, seed: int, back: bool) -> Tensor:
        ctx.seed, ctx.back = seed, back  # type: ignore[attr-defined]
        d = matrix.shape[1]
        signs = _signs(d, seed).to(matrix.device, matrix.dtype)
        found = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
        at_once = _AT_ONCE if matrix.device.type == "cpu" else _AT_ONCE_ON_GPU
        step = max(1, at_once // d)
        for start in range(0, len(matrix), step):
            rows = matrix[start : start + step]
            turned = _mixed(rows, True) * signs if back else _mixed(rows * signs, False)
            found[start : start + step] = turned
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _turned(gradient, ctx.seed, not ctx.back), None, None


def _mixed(matrix: Tensor, transposed: bool) -> Tensor:
    """Times ``C x H``, or its transpose; H is symmetric."""
    rows, d = matrix.shape
    n, m = _power_and_rest(d)
    mixed = (_butterflies(matrix.reshape(rows * m, n)) * (1 / math.sqrt(n))).view(rows, m, n)
    if m > 1:
        cosines = _cosines(m).to(matrix.device, matrix.dtype)
        mixed = (cosines if transposed else cosines.T) @ mixed
    return mixed.reshape(rows, d)


def _butterflies(matrix: Tensor) -> Tensor:
    """Times H_n, but for its size: sums and differences over every factor of two of n, in turn."""
    rows, n = matrix.shape
    half = 1
    while half < n:
        pairs = matrix.view(rows, n // (2 * half), 2, half)
        mixed = torch.empty_like(pairs)
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=mixed[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=mixed[:, :, 1])
        matrix = mixed.view(rows, n)
        half *= 2
    return matrix


@lru_cache(maxsize=64)
def factors(
    d: int, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A (p, p), B (q, q) and the signs (d,) of ``x T = A X B``, X the signed x as (p, q).

    ``C x H_n = (C x H_a) x H_b`` for every a b = n; p + q, the cost of an entry, is the least.
    """
    n, m = _power_and_rest(d)
    q = min((2**k for k in range(n.bit_length())), key=lambda b: d // b + b)
    cosines = _cosines(m).T.contiguous() if m > 1 else torch.ones(1, 1, dtype=torch.float64)
    left = torch.kron(cosines, _hadamard(n // q))
    right = _hadamard(q)
    found = (left, right, _signs(d, seed))
    a, b, signs = (part.to(device, dtype).contiguous() for part in found)
    return a, b, signs


def _hadamard(n: int) -> Tensor:
    """H_n, orthonormal, (n, n) float64."""
    return _butterflies(torch.eye(n, dtype=torch.float64)) / math.sqrt(n)


@lru_cache(maxsize=16)
def _cosines(m: int) -> Tensor:
    """The orthonormal cosine transform (type II), (m, m) float64."""
    k, j = torch.arange(m, dtype=torch.float64), torch.arange(m, dtype=torch.float64)
    matrix = torch.cos(math.pi / m * (j + 0.5)[None] * k[:, None]) * math.sqrt(2 / m)
    matrix[0] /= math.sqrt(2)
    return matrix


@lru_cache(maxsize=64)
def _signs(d: int, seed: int) -> Tensor:
    """Signs (d,) int8 from a hash, which no version of a random generator can change."""
    stream = shake_128(f"autocompress hadamard {seed}".encode()).digest(-(-d // 8))
    bits = unpack(torch.frombuffer(bytearray(stream), dtype=torch.uint8), 1, d)
    return bits.to(torch.int8) * 2 - 1


def _power_and_rest(d: int) -> tuple[int, int]:
    """(n, m) with d = n m, n the largest power of two that divides d."""
    n = d & -d
    return n, d // n


METHODS.add("hadamard", Hadamard())
