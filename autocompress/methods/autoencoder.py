"""Auto-encoded weights: a few bits for each piece of a row, and one decoder for several layers.

Banaei et al. 2023 (arXiv 2302.04045, "Revisiting Offline Compression"), concatenated mode: weights
of like layers are samples, a small network decodes their codes, and is stored once; the encoder is
thrown away. Layers are dense when they run: bytes count, multiply-accumulates do not.

Here a code z is ``latents`` signs; its ``piece`` of consecutive weights is, times the scales of its
row and columns, ``D(z) = V z + W_2 f(W_1 z + b)``, f the leaky ReLU. So the decoder has a codeword
for each of the 2^latents codes, and the encoder is a search through all of them, in the metric of
what the later inputs cannot make up for. With ``U^T U = (H + ridge I)^-1``, U upper, and J the
inputs of a piece, ``E_J = (W_J - Q_J) U_JJ^-1`` is least, and ``W_{:,k} -= E_J U_Jk`` for each
input k after it (GPTQ for vectors; van Baalen et al. 2024, arXiv 2402.15319). Then
``sum E^2 = tr(D (H + ridge I) D^T)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs
from autocompress.methods.coding import Coding, Quantized, Stored
from autocompress.methods.decoder import (
    DECODER,
    TINY,
    AutoencoderOptions,
    decoded,
    nearest,
    row_scales,
    signs,
    stored,
    trained,
)
from autocompress.methods.packing import pack, packed_bytes, unpack
from autocompress.methods.problem import DAMPING, InverseFactor, LayerProblem
from autocompress.methods.sharing import SharedQuantizer

_LEAST = 1e-3  # of a column's scale; columns below it count as dead
_CODES_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class AutoencoderCoding(Coding):
    """Codes of pieces, int32 in memory; scales of rows and of columns, and the decoder."""

    piece: int
    latents: int
    hidden: int
    maskable: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False  # a code has no whole number of bytes

    @property
    def bits(self) -> int:
        """See `Coding.bits`; the coding packs by itself."""
        return self.latents

    def codes_per_row(self, in_features: int) -> int:
        """See `Coding.codes_per_row`."""
        return in_features // self.piece

    def code_bytes(self, shape: tuple[int, int], n_kept: int | None = None) -> int:  # noqa: ARG002
        """See `Coding.code_bytes`."""
        return packed_bytes(self._n_codes(shape) * self.latents, 1)

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """See `Coding.parameters`."""
        shapes: dict[str, tuple[int, ...]] = {
            "scales": (shape[0],),
            "columns": (shape[1],),
            f"{DECODER}linear": (self.piece, self.latents),
        }
        if self.hidden:
            shapes[f"{DECODER}inner"] = (self.hidden, self.latents)
            shapes[f"{DECODER}bias"] = (self.hidden,)
            shapes[f"{DECODER}outer"] = (self.piece, self.hidden)
        return {name: TensorLayout(sizes, "float16") for name, sizes in shapes.items()}

    def values(
        self,
        codes: Tensor,
        parameters: Stored,
        shape: tuple[int, int],
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `Coding.values`."""
        scales = parameters["scales"].float()
        scales = scales if rows is None else scales[rows]
        codewords = decoded(parameters, signs(self.latents, codes.device))
        found = codewords[codes].view(-1, shape[1]) * parameters["columns"].float()
        return found * scales[:, None]

    def pack(self, codes: Tensor) -> Tensor:
        """See `Coding.pack`."""
        places = torch.arange(self.latents, device=codes.device)
        parts = torch.split(codes.reshape(-1), _CODES_AT_ONCE)
        bits = [((part[:, None] >> places) & 1).to(torch.uint8).view(-1) for part in parts]
        return pack(torch.cat(bits), 1)

    def unpack(self, packed: Tensor, shape: tuple[int, int], n_kept: int | None = None) -> Tensor:  # noqa: ARG002
        """See `Coding.unpack`."""
        return self._joined(packed, self._n_codes(shape)).view(shape[0], -1)

    def unpack_rows(self, packed: Tensor, shape: tuple[int, int], rows: Tensor) -> Tensor:
        """See `Coding.unpack_rows`."""
        width = self.codes_per_row(shape[1])
        if width * self.latents % 8:
            return self.unpack(packed, shape)[rows]
        wanted = packed.view(shape[0], -1)[rows].reshape(-1)
        return self._joined(wanted, len(rows) * width).view(len(rows), width)

    def _joined(self, packed: Tensor, n: int) -> Tensor:
        """`n` codes, int32."""
        bits = unpack(packed, 1, n * self.latents).view(n, self.latents)
        codes = torch.zeros(n, dtype=torch.int32, device=packed.device)
        for place in range(self.latents):
            codes |= bits[:, place].int() << place
        return codes


class Autoencoder(SharedQuantizer[AutoencoderOptions]):
    """One decoder of short codes for layers of adjacent blocks."""

    needs = Needs.HESSIAN
    options = AutoencoderOptions
    summary = "codes of a few bits for pieces of rows; layers of adjacent blocks share the decoder"

    def refusal(self, shape: tuple[int, int], options: AutoencoderOptions) -> str:
        """See `Method.refusal`."""
        if shape[1] % options.piece == 0:
            return ""
        legal = [size for size in range(2, 17) if shape[1] % size == 0]
        close = min(legal, key=lambda size: abs(size - options.piece), default=None)
        return (
            f"the piece of autoencoder must divide the {shape[1]} inputs, but got {options.piece}. "
            + (f"The nearest legal value is {close}." if close else "Take another method.")
        )

    def coding(self, options: AutoencoderOptions) -> Coding:
        """See `Quantizer.coding`."""
        return AutoencoderCoding(options.piece, options.latents, options.hidden)

    def is_shared(self, tensor: str) -> bool:
        """See `Sharing.is_shared`: the decoder is."""
        return tensor.startswith(DECODER)

    def quantize_together(
        self, problems: Sequence[LayerProblem], options: AutoencoderOptions
    ) -> list[Quantized]:
        """See `SharedQuantizer.quantize_together`."""
        columns = [column_scales(problem.weight) for problem in problems]
        even = [_evened(problem, c.float()) for problem, c in zip(problems, columns, strict=True)]
        decoder = trained(even, options)
        codewords = decoded(decoder, signs(options.latents, problems[0].weight.device))
        return [
            coded(problem, codewords, {"columns": scales, **decoder}, options.rounds)
            for problem, scales in zip(even, columns, strict=True)
        ]


def column_scales(weight: Tensor) -> Tensor:
    """Root mean square of each column by that of all, (d,) float16: a loud one is out of reach."""
    sizes = weight.double().square().mean(0).sqrt()
    sizes = (sizes / sizes.square().mean().sqrt().clamp(min=TINY)).float()
    return stored(torch.where(sizes < _LEAST, 1.0, sizes))


def _evened(problem: LayerProblem, columns: Tensor) -> LayerProblem:
    """The problem in inputs times `columns` (d,), whose weights are as much less."""
    found, statistics = problem.weight / columns, problem.statistics
    if problem.hessian is not None:
        hessian = columns[:, None] * problem.hessian * columns
        statistics = replace(statistics, hessian=hessian)
    return LayerProblem(found, statistics)


# Coding


def coded(
    problem: LayerProblem, codewords: Tensor, decoder: Mapping[str, Tensor], rounds: int
) -> Quantized:
    """Codes and scales of one layer, for codewords (2^latents, piece) of a decoder.

    Args:
        problem: with even columns.
        codewords: as decoded.
        decoder: what else is stored.
        rounds: of coordinate descent.
    """
    factor, notes = _factor(problem, codewords.shape[1])
    scales = row_scales(problem.weight)
    codes = compensated(problem.weight / scales[:, None], codewords, factor)
    scales = fitted_scales(problem, codewords[codes].flatten(1))
    for _ in range(rounds if factor.ridge > 0 else 0):
        codes = descended(problem, codes, codewords, scales, factor)
        scales = fitted_scales(problem, codewords[codes].flatten(1))
    return Quantized(codes, {"scales": stored(scales), **decoder}, notes)


def _factor(problem: LayerProblem, piece: int) -> tuple[InverseFactor, tuple[str, ...]]:
    factor, reason = problem.usable_factor(by_activation=True, damping=DAMPING, piece=piece)
    if factor is not None:
        return factor, ()
    order = torch.arange(problem.weight.shape[1], device=problem.weight.device)
    diagonal = torch.diag(problem.importance.rsqrt())
    return InverseFactor(diagonal, order, 0.0, 0.0), (f"autoencoder did not compensate: {reason}",)


def compensated(weight: Tensor, codewords: Tensor, factor: InverseFactor) -> Tensor:
    """Codes (o, d / piece) int32, piece by piece, each after the errors of those before."""
    (o, d), piece = weight.shape, codewords.shape[1]
    upper, places = factor.upper, (factor.order[::piece] // piece).tolist()
    rest = weight.T[factor.order].contiguous()
    codes = torch.empty(d // piece, o, dtype=torch.int32, device=weight.device)
    identity = torch.eye(piece, device=weight.device)
    for start in range(0, d, piece):
        stop = start + piece
        inverse = torch.linalg.solve_triangular(upper[start:stop, start:stop], identity, upper=True)
        targets = rest[start:stop].T
        found = nearest(targets @ inverse, codewords @ inverse)
        errors = (targets - codewords[found]) @ inverse
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors.T, alpha=-1)
        codes[places[start // piece]] = found
    return codes.T.contiguous()


def descended(
    problem: LayerProblem, codes: Tensor, codewords: Tensor, scales: Tensor, factor: InverseFactor
) -> Tensor:
    """Codes (o, d / piece) int32 after each became the best one given all others.

    With ``G = D (H + ridge I)``, least in the metric ``H_JJ`` is what is nearest to
    ``q_J - G_J H_JJ^-1`` (QuantEase, Behdin et al. 2023, arXiv 2309.01885, for vectors).
    """
    assert problem.hessian is not None  # else there is no factor
    piece, moving = codewords.shape[1], codes.T.contiguous()
    damped = problem.hessian.clone()
    damped.diagonal().add_(factor.ridge)
    target = problem.weight / scales.where(scales != 0, 1.0)[:, None]
    pushed = ((codewords[codes].flatten(1) - target) @ damped).T.contiguous()
    for place in (factor.order[::piece] // piece).tolist():
        here = slice(place * piece, (place + 1) * piece)
        lower = torch.linalg.cholesky(damped[here, here])
        before = codewords[moving[place]]
        wanted = before - torch.cholesky_solve(pushed[here], lower).T
        moving[place] = nearest(wanted @ lower, codewords @ lower)
        pushed.addmm_(damped[:, here], (codewords[moving[place]] - before).T)
    return moving.T.contiguous()


def fitted_scales(problem: LayerProblem, dense: Tensor) -> Tensor:
    """The scale of each row of `dense` (o, d) that loses least, ``w H q / q H q``, (o,)."""
    weighted = dense * problem.importance if problem.hessian is None else dense @ problem.hessian
    length = (weighted * dense).sum(1)
    return torch.where(length > 0, (weighted * problem.weight).sum(1) / length, 0.0)


METHODS.add("autoencoder", Autoencoder())
