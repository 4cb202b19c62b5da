"""Weights of 5 to 8 bits whose scales belong to groups: an int8 product for each group of inputs.

``aten._weight_int8pack_mm`` knows one scale per row. A group of columns is a matrix of its own with
one scale per row, so the groups are multiplied in turn and their scaled results added in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.kernels.base import (
    Kernel,
    Matrix,
    Stored,
    add,
    has_operator,
    rounding,
    tensor_bytes,
)
from autocompress.kernels.integer import (
    INT8_COLUMNS,
    INT8_ROWS,
    grid_options,
    int8_by_group,
)

_INT4_BITS = 4


@dataclass(frozen=True, eq=False)
class Groups:
    """Integers (groups, o, width) int8 and a scale per group and row, (groups, o) float32."""

    integers: Tensor
    scales: Tensor


class Int8Groups(Kernel[Groups]):
    """``_weight_int8pack_mm`` for each group of columns."""

    name = "int8_groups"
    form = "int8_groups"

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:  # noqa: ARG002
        """See `Kernel.tolerance`: inputs and the results of groups are rounded to bfloat16."""
        return rounding(torch.bfloat16, torch.bfloat16, dtype)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        if not has_operator("_weight_int8pack_mm", matrix.device):
            return f"torch has no _weight_int8pack_mm on {matrix.device.type}"
        options = grid_options(matrix)
        if options is None:
            return "the weights are not integers on a grid"
        if options.bits <= _INT4_BITS:
            return f"codes of {options.bits} bits are for int4_weight"
        if not options.symmetric and options.bits == 8:
            return "8-bit codes with a zero point do not fit int8"
        o, d = matrix.shape
        width = options.width(d)
        if width == d:
            return "a row has one scale: int8_weight takes it"
        if d % width or width % INT8_COLUMNS or o % INT8_ROWS:
            return (
                f"needs whole groups of a multiple of {INT8_COLUMNS} and a multiple of {INT8_ROWS} "
                f"outputs, but got groups of {width} of {o} x {d}"
            )
        return ""

    def repack(self, tensors: Stored, matrix: Matrix) -> Groups:
        """See `Kernel.repack`."""
        return Groups(*int8_by_group(tensors, matrix))

    def held_bytes(self, state: Groups) -> int:
        """See `Kernel.held_bytes`: a byte per weight and 4 per scale."""
        return tensor_bytes(state.integers, state.scales)

    def multiply(self, rows: Tensor, state: Groups) -> Tensor:
        """See `Kernel.multiply`."""
        n_groups, o, width = state.integers.shape
        ones = torch.ones(o, dtype=torch.bfloat16, device=rows.device)
        narrow = rows.to(torch.bfloat16).view(len(rows), n_groups, width)
        found = torch.zeros(len(rows), o, dtype=torch.float32, device=rows.device)
        for group in range(n_groups):
            inputs = narrow[:, group].contiguous()
            sums = torch.ops.aten._weight_int8pack_mm(inputs, state.integers[group], ones)
            found.addcmul_(sums.float(), state.scales[group])
        return found


add(Int8Groups())
