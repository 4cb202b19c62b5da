"""Two thin products instead of one: ``A (B x)``, each factor on its own best kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.scheme import Scheme
from autocompress.kernels.base import Kernel, Matrix, Stored, add, product_dtype, rounding
from autocompress.kernels.dispatch import Runner
from autocompress.methods.storage import under


@dataclass(frozen=True, eq=False)
class Factor:
    """A factor: its stored tensors and what multiplies by it."""

    tensors: Stored
    runner: Runner

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows times the factor."""
        return self.runner(self.tensors, rows)


class LowRank(Kernel[tuple[Factor, Factor]]):
    """The factors of a factorized layer, the inner one first."""

    name = "low_rank"
    form = "low_rank"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:
        """See `Kernel.tolerance`; of ``sum |A| |B| |x|``, for the least exact kernels of both."""
        product = product_dtype(dtype, device)
        each = rounding(product, product, product, torch.bfloat16, torch.bfloat16, torch.bfloat16)
        return 2 * each + rounding(dtype)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        return "" if matrix.plan.factorize is not None else "the layer is not two factors"

    def repack(self, tensors: Stored, matrix: Matrix) -> tuple[Factor, Factor]:
        """See `Kernel.repack`; the factors choose their kernels when they run."""
        shapes = matrix.plan.matrices(matrix.shape)
        scheme = _of_factors(matrix)
        outer, inner = (
            Factor(
                under(prefix, tensors),
                Runner(scheme, shapes[prefix], matrix.dtype, matrix.device),
            )
            for prefix in ("a.", "b.")
        )
        return outer, inner

    def held_bytes(self, state: tuple[Factor, Factor]) -> int:
        """See `Kernel.held_bytes`: what the kernels hold that the factors ran on so far."""
        return sum(factor.runner.extra_bytes for factor in state)

    def multiply(self, rows: Tensor, state: tuple[Factor, Factor]) -> Tensor:
        """See `Kernel.multiply`."""
        outer, inner = state
        return outer(inner(rows))


def _of_factors(matrix: Matrix) -> Scheme:
    """What the factors are stored by: the stages between factorization and rounding of inputs."""
    ready = matrix.plan
    stages = ready.scheme.stages
    first = 1 + (ready.transform is not None)
    last = len(stages) - (ready.inputs is not None)
    return Scheme(stages[first:last])


add(LowRank())
