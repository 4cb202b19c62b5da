"""Trellis codes: the value of a code depends on the codes of the rows above it.

QTIP (Tseng et al. 2024, arXiv 2406.11235): Gaussian weights at R bits lose about half of what the
best scalar levels lose, near the bound 2^-2R, for no more bits. A state is the last 12 bits of the
codes of a column, so each code of R bits moves to one of 2^R states (a bit-shift trellis), and the
value of a state is a Gaussian quantile in a scrambled order (section 3.3). QTIP codes tiles of
16 x 16 weights and so compensates between groups of 16 inputs; here the path goes down a column,
so that GPTQ makes up for every input at once. Paths are cycles of 256 rows: none stores a start.
A row has one scale, by least squares in the end. Meant for a rotated basis, where weights are
Gaussian: ``hadamard+trellis(bits=3)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Coding, Quantized, Stored
from autocompress.methods.gptq import Sweep, in_place, require_damping, row_slices
from autocompress.methods.levels import row_blocks, storable, taken
from autocompress.methods.packing import pack, unpack
from autocompress.methods.problem import DAMPING, InverseFactor, LayerProblem
from autocompress.methods.viterbi import Trellis

WINDOW = 12
RUN = 256
_STRIDE = 979  # of ten that were tried, the least error on Gaussian numbers
_FEWEST_ROWS = 16  # a window within one cycle, at any width


@dataclass(frozen=True, slots=True)
class TrellisOptions:
    """Options of trellis codes.

    Attributes:
        bits: of a code, 1 to 6.
        damping: share of the mean of diag(H) added to the diagonal, above 0, at most 1.
    """

    bits: int = 3
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 6:
            raise SchemeError(
                f"bits must be 1 to 6, but got {self.bits}. "
                f"The nearest legal value is {min(max(self.bits, 1), 6)}."
            )
        require_damping(self.damping)


@lru_cache(maxsize=1)
def table() -> Tensor:
    """The value of each state, (4096,) float32 that float16 holds."""
    n = 1 << WINDOW
    places = (torch.arange(n) * _STRIDE) % n
    quantiles: Tensor = torch.special.ndtri((places.double() + 0.5) / n)
    return quantiles.to(torch.float16).float()


@dataclass(frozen=True, slots=True)
class TrellisCoding(Coding):
    """States in memory, their lowest `width` bits in the file; `scales` (o,) float16."""

    width: int
    maskable: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False  # a value needs the codes of the rows above

    @property
    def bits(self) -> int:
        """See `Coding.bits`."""
        return self.width

    @property
    def trellis(self) -> Trellis:
        """The paths that codes describe."""
        return Trellis(table(), self.width, RUN)

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """See `Coding.parameters`."""
        return {"scales": TensorLayout((shape[0],), "float16")}

    def values(
        self,
        codes: Tensor,
        parameters: Stored,
        shape: tuple[int, int],  # noqa: ARG002
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `Coding.values`; `codes` are states (rows, d) int16."""
        scales = taken(parameters["scales"], rows).float()
        levels, found = table().to(codes.device), torch.empty(codes.shape, device=codes.device)
        for part in row_blocks(codes):
            torch.mul(levels[codes[part].int()], scales[part, None], out=found[part])
        return found

    def pack(self, codes: Tensor) -> Tensor:
        """See `Coding.pack`."""
        return pack((codes & ((1 << self.width) - 1)).to(torch.uint8), self.width)

    def unpack(
        self,
        packed: Tensor,
        shape: tuple[int, int],
        n_kept: int | None = None,  # noqa: ARG002 - it is not maskable
    ) -> Tensor:
        """See `Coding.unpack`; states (o, d) int16."""
        codes = unpack(packed, self.width, shape[0] * shape[1]).view(shape)
        above = self._above(shape[0]).to(codes.device)
        states, seen = codes.to(torch.int16), codes
        for shift in range(self.width, WINDOW, self.width):
            seen = seen[above]
            states |= _shifted(seen, shift)
        return states

    def unpack_rows(self, packed: Tensor, shape: tuple[int, int], rows: Tensor) -> Tensor:
        """See `Coding.unpack_rows`; reads the rows above as well."""
        if shape[1] % 8:
            return self.unpack(packed, shape)[rows]
        above = self._above(shape[0]).to(rows.device)
        states = torch.zeros(len(rows), shape[1], dtype=torch.int16, device=packed.device)
        for shift in range(0, WINDOW, self.width):
            wanted = packed.view(shape[0], -1)[rows].reshape(-1)
            codes = unpack(wanted, self.width, states.numel()).view(states.shape)
            states |= _shifted(codes, shift)
            rows = above[rows]
        return states

    def _above(self, n_rows: int) -> Tensor:
        """The row before each in its cycle, (n_rows,)."""
        above = torch.arange(n_rows) - 1
        for start, stop in self.trellis.bounds(n_rows):
            above[start] = stop - 1
        return above


def _shifted(codes: Tensor, shift: int) -> Tensor:
    """Codes uint8 at their place in a state, int16; bits that leave the window are dropped."""
    return (codes & min((1 << (WINDOW - shift)) - 1, 255)).to(torch.int16) << shift


class TrellisQuantizer(Quantizer[TrellisOptions]):
    """GPTQ whose columns are paths through a trellis."""

    needs = Needs.HESSIAN
    options = TrellisOptions
    compiled = True
    summary = "trellis codes with error compensation: half the error of levels; best if rotated"

    def refusal(self, shape: tuple[int, int], options: TrellisOptions) -> str:  # noqa: ARG002
        """See `Method.refusal`."""
        if shape[0] >= _FEWEST_ROWS:
            return ""
        return (
            f"trellis takes layers of {_FEWEST_ROWS} outputs or more, but got {shape[0]}. "
            "Take another method, as gptq(bits=4)."
        )

    def coding(self, options: TrellisOptions) -> Coding:
        """See `Quantizer.coding`."""
        return TrellisCoding(options.bits)

    def quantize(
        self,
        problem: LayerProblem,
        mask: Tensor | None,  # noqa: ARG002 - the coding is not maskable
        options: TrellisOptions,
    ) -> Quantized:
        """See `Quantizer.quantize`; does not compensate, with a note, where H is of no use."""
        factor, reason = problem.usable_factor(by_activation=True, damping=options.damping)
        hessian = None if factor is None else problem.hessian
        trellis = TrellisCoding(options.bits).trellis
        codes, scales = [], []
        for part in row_slices(len(problem.weight)):
            weight = problem.weight[part]
            first = _row_scales(weight)
            states = _swept(weight, first, trellis, factor)
            codes.append(states)
            scales.append(_fitted(weight, states, first, hessian))
        notes = (f"trellis did not compensate: {reason}",) if factor is None else ()
        return Quantized(torch.cat(codes), {"scales": torch.cat(scales)}, notes)


def _row_scales(weight: Tensor) -> Tensor:
    """Root mean squares of rows (o,), as float16 holds them; zero for rows of zeros."""
    size = weight.square().mean(1).sqrt()
    return torch.where(size == 0, 0.0, storable(size))


def _swept(
    weight: Tensor, scales: Tensor, trellis: Trellis, factor: InverseFactor | None
) -> Tensor:
    """States (o, d) int16 of `weight` (o, d), given scales (o,)."""
    divisors = torch.where(scales == 0, 1.0, scales)
    costs = scales.square() / scales.square().mean().clamp(min=1e-30)
    levels = trellis.table.to(weight.device)
    states = torch.empty(weight.T.shape, dtype=torch.int16, device=weight.device)

    def settle(j: int, target: Tensor) -> Tensor:
        states[j] = trellis.states(target / divisors, costs)
        return levels[states[j].int()] * scales

    if factor is None:
        for j, target in enumerate(weight.T):
            settle(j, target)
        return states.T.contiguous()
    Sweep(weight.T[factor.order].contiguous(), factor.upper, settle).run(0, len(factor.order))
    return in_place(states, factor.order)


def _fitted(weight: Tensor, states: Tensor, scales: Tensor, hessian: Tensor | None) -> Tensor:
    """The scales (o,) float16 of least ``(w - s v) H (w - s v)^T``, v the values of the states."""
    values = table().to(weight.device)[states.int()]
    seen = values if hessian is None else values @ hessian
    best = (weight * seen).sum(1) / (values * seen).sum(1)
    usable = torch.isfinite(best) & (best > 0) & (scales > 0)
    return torch.where(usable, storable(best.where(usable, scales)), scales).to(torch.float16)


METHODS.add("trellis", TrellisQuantizer())
