"""Sub-group precision: equal bands of rows, each with a bit width of its own; 0 prunes a band.

The sub-groups of AQ-BERT (Zhao et al. 2021, arXiv 2112.14938, section 3: heads, and finer), with
widths chosen one-shot. Rows are independent under GPTQ, so every band is swept at every width, and
the widths of least total loss whose sum is given are found exactly, by dynamic programming. What
is stored depends on that sum alone: each width but zero is packed apart in whole bytes, and scales
are stored for all bands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.core.errors import ModelError, SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Coding, Damage, Quantized, Stored
from autocompress.methods.gptq import sweep
from autocompress.methods.grid import Grid, GridOptions, best_grid
from autocompress.methods.packing import pack, packed_bytes, unpack
from autocompress.methods.problem import DAMPING, InverseFactor, LayerProblem

WIDTHS = (0, 2, 4, 8)
_AUTO = "auto"


@dataclass(frozen=True, slots=True)
class SubgroupOptions:
    """Options of sub-group precision.

    Attributes:
        bits: width of each band from the first to the last, such as ``4-2-0-4``, out of 0, 2, 4
            and 8; or ``auto``: chosen by loss.
        bands: how many; must divide the number of outputs. That of `bits` if they are given.
        average: of the widths of all bands; its product with `bands` is rounded to an even number.
            That of `bits` if they are given.
        group_size: weights of a row that share a scale; 0: the whole row.
    """

    bits: str = _AUTO
    bands: int = 8
    average: float = 3.0
    group_size: int = 128

    def __post_init__(self) -> None:
        GridOptions(group_size=self.group_size)  # the same rule
        if self.bits != _AUTO:
            widths = _read(self.bits)
            # One value for one meaning, whatever the options that `bits` overrides.
            object.__setattr__(self, "bands", len(widths))
            object.__setattr__(self, "average", sum(widths) / len(widths))
        if self.bands < 2:
            raise SchemeError(
                f"bands must be at least 2, but got {self.bands}. The nearest legal value is 2."
            )
        lowest, highest = 2 / self.bands, WIDTHS[-1]
        if not lowest <= self.average <= highest:
            raise SchemeError(
                f"average must be {lowest:g} to {highest} in {self.bands} bands, but got "
                f"{self.average}. The nearest legal value is "
                f"{lowest if self.average < lowest else highest:g}."
            )

    @property
    def given(self) -> tuple[int, ...]:
        """Widths as given; empty if they are chosen by loss."""
        return () if self.bits == _AUTO else _read(self.bits)

    @property
    def total(self) -> int:
        """The sum of the widths of all bands: even, and not the one that no widths add up to."""
        nearest = 2 * round(self.average * self.bands / 2)
        highest = WIDTHS[-1] * self.bands
        return highest - 4 if nearest == highest - 2 else nearest

    def grid(self, bits: int) -> GridOptions:
        """The grid of a band of `bits` > 0."""
        return GridOptions(bits, self.group_size)


def _read(bits: str) -> tuple[int, ...]:
    parts = bits.split("-")
    if not all(part in ("0", "2", "4", "8") for part in parts) or set(parts) == {"0"}:
        raise SchemeError(
            "bits must be auto, or the widths of the bands out of 0, 2, 4 and 8, not all 0, with "
            f"dashes between them, but got {bits!r}. Example: 4-2-0-4."
        )
    return tuple(int(part) for part in parts)


@dataclass(frozen=True, slots=True)
class BandCoding(Coding):
    """Codes on symmetric grids of a width per band, with scales (o, G) float16.

    A row of codes starts with the width of its band; then there is one code per weight. Packed,
    the widths of all bands come first, then the bands: eight bits wide, four, two, in order.
    """

    options: SubgroupOptions
    maskable: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        """See `Coding.bits`; of the widest band possible."""
        return WIDTHS[-1]

    def codes_per_row(self, in_features: int) -> int:
        """See `Coding.codes_per_row`."""
        return 1 + in_features

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """See `Coding.parameters`."""
        n_groups = self.options.grid(8).n_groups(shape[1])
        return {"scales": TensorLayout((shape[0], n_groups), "float16")}

    def code_bytes(self, shape: tuple[int, int], n_kept: int | None = None) -> int:  # noqa: ARG002
        """See `Coding.code_bytes`."""
        n = shape[0] // self.options.bands * shape[1]
        return self.options.bands + packed_bytes(n, 1) * self.options.total

    def pack(self, codes: Tensor) -> Tensor:
        """See `Coding.pack`."""
        bands = codes.view(self.options.bands, -1, codes.shape[1])
        widths = bands[:, 0, 0]
        parts = [widths]
        for width in WIDTHS[:0:-1]:
            chosen = bands[widths == width][:, :, 1:].flatten(1)
            padded = torch.nn.functional.pad(chosen, (0, -chosen.shape[1] % 8))
            parts.append(pack(padded, width))
        return torch.cat(parts)

    def unpack(
        self,
        packed: Tensor,
        shape: tuple[int, int],
        n_kept: int | None = None,  # noqa: ARG002
    ) -> Tensor:
        """See `Coding.unpack`."""
        n_bands = self.options.bands
        widths, n = packed[:n_bands], shape[0] // n_bands * shape[1]
        wrong = self._wrong_widths(packed)
        if wrong:
            raise ModelError(
                f"The codes of this layer {wrong}: the file is damaged. Next step: export it again."
            )
        bands = packed.new_zeros(n_bands, shape[0] // n_bands, 1 + shape[1])
        bands[:, :, 0] = widths[:, None]
        start = n_bands
        for width in WIDTHS[:0:-1]:
            chosen = widths == width
            n_codes = int(chosen.sum()) * packed_bytes(n, 8)
            stop = start + packed_bytes(n_codes, width)
            codes = unpack(packed[start:stop], width, n_codes)
            codes = codes.view(-1, packed_bytes(n, 8))[:, :n]
            bands[chosen, :, 1:] = codes.reshape(-1, shape[0] // n_bands, shape[1])
            start = stop
        return bands.view(shape[0], -1)

    def damage(
        self,
        stored: Stored,
        shape: tuple[int, int],  # noqa: ARG002
        n_kept: int | None,  # noqa: ARG002
    ) -> Damage | None:
        """See `Coding.damage`: the widths of the bands."""
        wrong = self._wrong_widths(stored["packed"])
        return Damage("packed", wrong) if wrong else None

    def _wrong_widths(self, packed: Tensor) -> str:
        found = packed[: self.options.bands].tolist()
        if set(found) <= set(WIDTHS) and sum(found) == self.options.total:
            return ""
        return (
            f"must start with widths of bands among {WIDTHS} that add up to {self.options.total}, "
            f"but start with {found}"
        )

    def unpack_rows(self, packed: Tensor, shape: tuple[int, int], rows: Tensor) -> Tensor:
        """See `Coding.unpack_rows`."""
        return self.unpack(packed, shape)[rows]

    def values(
        self,
        codes: Tensor,
        parameters: Stored,
        shape: tuple[int, int],  # noqa: ARG002
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `Coding.values`."""
        scales = parameters["scales"] if rows is None else parameters["scales"][rows]
        widths = codes[:, :1].to(torch.int16)
        zeros = torch.ones_like(widths) << widths >> 1
        return Grid(self.options.grid(8), scales, zeros.expand(scales.shape)).dense(codes[:, 1:])


class Subgroup(Quantizer[SubgroupOptions]):
    """A bit width for each band of rows."""

    needs = Needs.HESSIAN
    options = SubgroupOptions
    summary = "bands of rows (heads) with bit widths out of 0, 2, 4, 8, chosen by their loss"

    def refusal(self, shape: tuple[int, int], options: SubgroupOptions) -> str:
        """See `Method.refusal`."""
        if shape[0] % options.bands == 0:
            return ""
        legal = [bands for bands in range(2, shape[0] + 1) if shape[0] % bands == 0]
        close = min(legal, key=lambda bands: abs(bands - options.bands), default=None)
        return (
            f"the bands of subgroup must divide the {shape[0]} outputs, but got {options.bands}. "
            + (f"The nearest legal value is {close}." if close else "Take another method.")
        )

    def coding(self, options: SubgroupOptions) -> Coding:
        """See `Quantizer.coding`."""
        return BandCoding(options)

    def quantize(
        self,
        problem: LayerProblem,
        mask: Tensor | None,  # noqa: ARG002 - the coding is not maskable
        options: SubgroupOptions,
    ) -> Quantized:
        """See `Quantizer.quantize`; rounds to nearest, with a note, where H is of no use."""
        factor, reason = problem.usable_factor(by_activation=True, damping=DAMPING)
        bands = _Bands(problem, options, factor)
        widths = options.given or allocate(bands.losses(), options.total)
        codes, scales = bands.coded(widths)
        notes = (f"subgroup rounded to nearest: {reason}",) if reason else ()
        return Quantized(codes, {"scales": scales}, notes)


class _Bands:
    """The rows of a layer at any width; remembers what it coded whole.

    `factor` is None where errors cannot be made up for; they then count by diag(H).
    """

    def __init__(
        self, problem: LayerProblem, options: SubgroupOptions, factor: InverseFactor | None
    ) -> None:
        self._problem, self._options, self._factor = problem, options, factor
        self._whole: dict[int, tuple[Tensor, Grid]] = {}

    def losses(self) -> Tensor:
        """Loss of each band at each of `WIDTHS`, (bands, 4) float64."""
        weight = self._problem.weight
        losses = [self._loss(weight)]
        for width in WIDTHS[1:]:
            codes, grid = self._whole[width] = self._swept(weight, width)
            losses.append(self._loss(grid.dense(codes).sub_(weight)))
        return torch.stack(losses, dim=1)

    def coded(self, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Codes (o, 1 + d) uint8 and scales (o, G) float16 under a width per band."""
        weight = self._problem.weight
        o, d = weight.shape
        by_row = torch.tensor(widths, dtype=torch.uint8, device=weight.device)
        by_row = by_row.repeat_interleave(o // len(widths))
        codes = weight.new_zeros((o, 1 + d), dtype=torch.uint8)
        codes[:, 0] = by_row
        n_groups = self._options.grid(8).n_groups(d)
        scales = weight.new_zeros((o, n_groups), dtype=torch.float16)
        for width in sorted(set(widths) - {0}):
            here = by_row == width
            if width in self._whole:
                found, grid = self._whole[width]
                codes[here, 1:], scales[here] = found[here], grid.scales[here]
            else:
                found, grid = self._swept(weight[here], width)
                codes[here, 1:], scales[here] = found, grid.scales
        return codes, scales

    def _swept(self, weight: Tensor, width: int) -> tuple[Tensor, Grid]:
        grid = best_grid(weight, self._problem.importance, self._options.grid(width))
        if self._factor is None:
            return grid.codes(weight), grid
        return sweep(weight, None, grid, self._factor), grid

    def _loss(self, error: Tensor) -> Tensor:
        hessian = self._problem.hessian
        if self._factor is None or hessian is None:
            weighted = error * self._problem.importance
        else:
            weighted = error @ hessian
        return (weighted * error).view(self._options.bands, -1).sum(1, dtype=torch.float64)


def allocate(losses: Tensor, total: int) -> tuple[int, ...]:
    """The widths out of `WIDTHS`, one per band, of least summed loss that add up to `total`.

    Args:
        losses: of each band at each width, (bands, 4) float64.
        total: even; some widths must add up to it.
    """
    n_states = total // 2 + 1
    least = losses.new_full((n_states,), torch.inf)
    least[0] = 0.0
    choices = []
    for band in losses:
        spent = [
            torch.nn.functional.pad(least, (width // 2, 0), value=torch.inf)[:n_states] + loss
            for width, loss in zip(WIDTHS, band, strict=True)
        ]
        least, choice = torch.stack(spent).min(0)
        choices.append(choice)
    widths: list[int] = []
    for choice in reversed(choices):
        widths.append(WIDTHS[int(choice[(total - sum(widths)) // 2])])
    return tuple(reversed(widths))


METHODS.add("subgroup", Subgroup())
