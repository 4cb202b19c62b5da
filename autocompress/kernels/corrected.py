"""A layer with a residual: its matrix on that one's best kernel, and the part beside it alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.scheme import Scheme
from autocompress.kernels.base import Kernel, Matrix, Stored, add, product_dtype, rounding
from autocompress.kernels.dispatch import Runner
from autocompress.methods.base import Multiplier
from autocompress.methods.storage import RESIDUAL, TRANSFORM, under


@dataclass(frozen=True, eq=False)
class Parts:
    """What is added up.

    Attributes:
        tensors: stored, of the matrix without its residual.
        runner: multiplies by that.
        residual: multiplies by the rest.
    """

    tensors: Stored
    runner: Runner
    residual: Multiplier


class Corrected(Kernel[Parts]):
    """``C x + R x``; R x from the stored form of the part: thin factors, columns, entries."""

    name = "corrected"
    form = "corrected"
    takes_residuals = True

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:
        """See `Kernel.tolerance`; for the least exact kernel of the matrix."""
        product = product_dtype(dtype, device)
        matrix = rounding(product, product, torch.bfloat16, torch.bfloat16, torch.bfloat16)
        return 2 * matrix + rounding(dtype)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        return "" if matrix.plan.residual is not None else "the scheme stores no part apart"

    def repack(self, tensors: Stored, matrix: Matrix) -> Parts:
        """See `Kernel.repack`."""
        step = matrix.plan.residual
        assert step is not None  # refuses has checked
        main = {n: t for n, t in tensors.items() if not n.startswith((RESIDUAL, TRANSFORM))}
        runner = Runner(_of_matrix(matrix), matrix.shape, matrix.dtype, matrix.device)
        part = under(RESIDUAL, tensors)
        return Parts(main, runner, step.method.multiplier(part, matrix.shape, step.options))

    def held_bytes(self, state: Parts) -> int:
        """See `Kernel.held_bytes`: what both hold."""
        return state.residual.n_bytes + state.runner.extra_bytes

    def multiply(self, rows: Tensor, state: Parts) -> Tensor:
        """See `Kernel.multiply`."""
        found = state.runner(state.tensors, rows).float()
        return found + state.residual.apply(rows.float())


def _of_matrix(matrix: Matrix) -> Scheme:
    """What is between a change of basis and the residual."""
    ready = matrix.plan
    first = int(ready.transform is not None)
    last = len(ready.scheme.stages) - 1 - int(ready.inputs is not None)
    return Scheme(ready.scheme.stages[first:last])


add(Corrected())
