"""Two of every four weights, on the sparse tensor cores of a GPU.

``torch.sparse.to_sparse_semi_structured`` (Mishra et al. 2021, arXiv 2104.08378). The kept values
are held in 16 bits with 2 bits of index each: 9/16 of the dense 16-bit matrix. Quantized weights
are decoded once to those values.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional

from autocompress.kernels.base import Kernel, Matrix, Stored, add, rounding

_ROWS, _COLUMNS = 32, 64  # of which the operator takes multiples
_FIRST_CAPABILITY = (8, 0)


class Sparse24(Kernel[Tensor]):
    """Semi-structured sparse products; CUDA only."""

    name = "sparse_2_4"
    form = "sparse_2_4"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:  # noqa: ARG002
        """See `Kernel.tolerance`: weights and outputs are rounded to the compute dtype."""
        return rounding(dtype, dtype, dtype)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        if matrix.device.type != "cuda":
            return f"needs a CUDA device, but got {matrix.device.type}"
        if torch.cuda.get_device_capability(matrix.device) < _FIRST_CAPABILITY:
            return "needs sparse tensor cores (compute capability 8.0)"
        if matrix.dtype not in {torch.float16, torch.bfloat16}:
            return f"needs float16 or bfloat16, but computes in {matrix.dtype}"
        return _refuses_pattern(matrix)

    def repack(self, tensors: Stored, matrix: Matrix) -> Tensor:
        """See `Kernel.repack`; the dense matrix lives while it is repacked."""
        dense = matrix.storage.decode(tensors).to(matrix.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*prototype stage", UserWarning)
            sparse: Tensor = torch.sparse.to_sparse_semi_structured(dense)
        return sparse

    def held_bytes(self, state: Tensor) -> int:
        """See `Kernel.held_bytes`: half the values, and two bits of index for each weight."""
        return state.shape[0] * state.shape[1] * 9 // 8

    def multiply(self, rows: Tensor, state: Tensor) -> Tensor:
        """See `Kernel.multiply`."""
        return functional.linear(rows.to(state.dtype), state)


def _refuses_pattern(matrix: Matrix) -> str:
    sparsify = matrix.plan.sparsify
    if matrix.plan.factorize is not None or sparsify is None:
        return "the scheme does not prune by a pattern"
    if getattr(sparsify.options, "kept_of", None) != (2, 4):
        return "needs the pattern 2:4"
    o, d = matrix.shape
    if o % _ROWS or d % _COLUMNS:
        return f"needs multiples of {_ROWS} outputs and {_COLUMNS} inputs, but got {o} x {d}"
    return ""


add(Sparse24())
