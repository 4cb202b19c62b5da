"""Integer weights times integer inputs: what `int_inputs` means, computed as it is meant.

Each token is rounded on a grid of its own (`IntInputs`), products and sums are integers, and both
scales multiply the result (ZeroQuant, Yao et al. 2022, arXiv 2206.01861). On a GPU by
``aten._int_mm``. On CPUs by fbgemm, whose inputs are unsigned: they are shifted by
``2^(bits - 1)``, which it takes back.

CPUs without VNNI add pairs of products in 16 bits, which saturate if the bits of inputs and weights
add up to 16. Whether they do is found by one product of extreme codes. Where it is wrong, inputs
are split, ``x = 2 h + l`` with 7-bit h and l in {0, 1}: twice the rows, every sum exact.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autocompress.kernels.base import Kernel, Matrix, Stored, add, has_operator, rounding
from autocompress.kernels.integer import Int8Rows, grid_options, int8_rows, refuses_int8
from autocompress.methods.int_inputs import IntInputsOptions

_ALIGNED = 8
_LEAST_ROWS = 17  # of the CUDA operator
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Multiplier:
    """Integer weights, ready for their device.

    Attributes:
        rows: integers and scales; on CPUs the integers are on the meta device, `handle` has them.
        handle: packed weights of fbgemm; None on a GPU.
        bits: of the inputs.
        split: inputs are split, because sums of whole products saturate.
    """

    rows: Int8Rows
    handle: Any
    bits: int
    split: bool


class DynamicInt8(Kernel[Multiplier]):
    """Per-row integer weights, per-token integer inputs, exact integer sums."""

    name = "dynamic_int8"
    form = "dynamic_int8"
    rounds_inputs = True

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:  # noqa: ARG002
        """See `Kernel.tolerance`; sums are integers, converted and scaled in float32."""
        return rounding(dtype)

    def refuses(self, matrix: Matrix) -> str:
        """See `Kernel.refuses`."""
        step = matrix.plan.inputs
        if step is None or not isinstance(step.options, IntInputsOptions):
            return "the scheme does not round the inputs to integers"
        reason = refuses_int8(matrix)
        if reason:
            return reason
        if matrix.device.type == "cpu":
            return "" if _takes_codes() else "torch has no fbgemm integer products on this CPU"
        if not has_operator("_int_mm", matrix.device):
            return f"torch has no _int_mm on {matrix.device.type}"
        if any(size % _ALIGNED for size in matrix.shape):
            return f"needs multiples of {_ALIGNED} outputs and inputs, but got {matrix.shape}"
        return ""

    def repack(self, tensors: Stored, matrix: Matrix) -> Multiplier:
        """See `Kernel.repack`."""
        rows, step, options = int8_rows(tensors, matrix), matrix.plan.inputs, grid_options(matrix)
        assert step is not None  # refuses has checked
        assert options is not None
        bits = step.options.bits
        if matrix.device.type != "cpu":
            return Multiplier(rows, None, bits, split=False)
        # A zero point takes the integers to one bit more than the codes have.
        weight_bits = options.bits if options.symmetric else options.bits + 1
        handle = _packed(rows.integers)
        split = not _is_exact(bits, weight_bits)
        return Multiplier(Int8Rows(rows.integers.to("meta"), rows.scales), handle, bits, split)

    def held_bytes(self, state: Multiplier) -> int:
        """See `Kernel.held_bytes`: a byte per weight; fbgemm fills rows up to whole blocks."""
        return state.rows.n_bytes

    def multiply(self, rows: Tensor, state: Multiplier) -> Tensor:
        """See `Kernel.multiply`."""
        rows = rows.float()
        largest = (1 << (state.bits - 1)) - 1
        scale = (rows.abs().amax(-1, keepdim=True) / largest).clamp(min=_TINY)
        codes = (rows / scale).round_()
        if state.handle is None:
            sums = _on_gpu(codes, state.rows.integers)
        elif state.split:
            high = codes.div(2).floor_()
            both = _by_fbgemm(torch.cat([high, codes - 2 * high]), state.handle, state.bits - 1)
            sums = torch.add(both[len(codes) :], both[: len(codes)], alpha=2)
        else:
            sums = _by_fbgemm(codes, state.handle, state.bits)
        return sums.mul_(scale).mul_(state.rows.scales)


def _on_gpu(codes: Tensor, integers: Tensor) -> Tensor:
    """Integer products by ``_int_mm``, which takes no fewer than 17 rows."""
    n = len(codes)
    filled = functional.pad(codes.to(torch.int8), (0, 0, 0, max(_LEAST_ROWS, n + -n % 8) - n))
    return torch._int_mm(filled, integers.t())[:n].float()


def _by_fbgemm(codes: Tensor, handle: Any, bits: int) -> Tensor:
    """Integer codes (n, d) float32 of `bits` bits times packed integers: sums as float32."""
    operator = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    sums: Tensor = operator(codes.contiguous(), 1.0, 1 << (bits - 1), handle)
    return sums


def _packed(integers: Tensor) -> Any:
    """Integers (o, d) int8 in fbgemm's layout, with scales of one."""
    n = len(integers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor.*")
        quantized = torch._make_per_channel_quantized_tensor(
            integers, torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.int64), 0
        )
        return torch.ops.quantized.linear_prepack(quantized, None)


@lru_cache(maxsize=1)
def _takes_codes() -> bool:
    """True if narrow codes come out right, which no saturation can spoil."""
    try:
        return _is_exact(6, 6)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


@lru_cache(maxsize=64)
def _is_exact(input_bits: int, weight_bits: int) -> bool:
    """True if products of extreme codes of so many bits are right."""
    high = (1 << (input_bits - 1)) - 1
    low = 1 << (weight_bits - 1)
    inputs = torch.tensor([[high], [-high]], dtype=torch.float32).expand(2, 64)
    integers = torch.tensor([[low - 1], [-low]], dtype=torch.int8).expand(2, 64).contiguous()
    found = _by_fbgemm(inputs, _packed(integers), input_bits)
    return torch.equal(found, inputs @ integers.float().t())


add(DynamicInt8())
