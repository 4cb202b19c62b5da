"""The decoder of `autoencoder`: what a code means, how it is found, how the decoder is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autocompress.core.errors import SchemeError
from autocompress.methods.coding import Stored
from autocompress.methods.problem import LayerProblem
from autocompress.methods.sharing import read_numbers

DECODER = "decoder_"
"""What the names of the decoder's tensors start with."""

_SLOPE = 0.125  # of the leaky side, exact in binary
_FP16_MAX = 65504.0
TINY = 1e-30
_PIECES_SEEN = 1 << 16  # by training
_DISTANCES_OF_A_STEP = 1 << 22
_PIECES_OF_A_STEP = 4096
_DISTANCES_AT_ONCE = 1 << 18
_RATE = 5e-3
_MEAN, _SQUARE, _EPSILON = 0.9, 0.999, 1e-8
_SPREAD = 0.95  # of the codewords that training starts from, along each place
_NOISE = 0.15


@dataclass(frozen=True, slots=True)
class AutoencoderOptions:
    """Options of `autoencoder`.

    Attributes:
        piece: weights that a code stands for, 2 to 16; it must divide the number of inputs.
        latents: bits of a code, 2 to 16.
        hidden: units of the decoder's bend, 0 to 256; without any it is linear.
        steps: of training, 0 or more.
        rounds: of coordinate descent over codes, 0 or more.
        blocks: numbers in the names of the layers that share the decoder, as ``0/1``; a search
            space says it by `span`.
    """

    piece: int = 4
    latents: int = 12
    hidden: int = 32
    steps: int = 200
    rounds: int = 2
    blocks: str = ""

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("piece", self.piece, 2, 16),
            ("latents", self.latents, 2, 16),
            ("hidden", self.hidden, 0, 256),
            ("steps", self.steps, 0, 10_000),
            ("rounds", self.rounds, 0, 100),
        ):
            if not low <= value <= high:
                raise SchemeError(
                    f"{name} must be {low} to {high}, but got {value}. "
                    f"The nearest legal value is {min(max(value, low), high)}."
                )
        read_numbers(self.blocks)


def signs(latents: int, device: torch.device) -> Tensor:
    """All codes z, (2^latents, latents) float32: place t of code c is bit t of c, -1 or 1."""
    codes = torch.arange(1 << latents, device=device)[:, None]
    return ((codes >> torch.arange(latents, device=device) & 1) * 2 - 1).float()


def decoded(decoder: Stored, latents: Tensor) -> Tensor:
    """``V z + W_2 f(W_1 z + b)`` of each z of `latents` (n, latents): (n, piece) float32."""
    linear = latents @ decoder[f"{DECODER}linear"].float().T
    if f"{DECODER}inner" not in decoder:
        return linear
    inner, bias, outer = (decoder[f"{DECODER}{part}"].float() for part in _BEND)
    return linear + functional.leaky_relu(latents @ inner.T + bias, _SLOPE) @ outer.T


_BEND = ("inner", "bias", "outer")


def trained(problems: Sequence[LayerProblem], options: AutoencoderOptions) -> dict[str, Tensor]:
    """The decoder as stored, float16, fitted to pieces of all the layers."""
    pieces, shares = sample(problems, options.piece)
    generator = torch.Generator().manual_seed(0)
    decoder = first_decoder(options, generator)
    decoder = {name: t.to(pieces.device).requires_grad_() for name, t in decoder.items()}
    codes = signs(options.latents, pieces.device)
    adam = _Adam(list(decoder.values()))
    n_pieces = max(1, min(_PIECES_OF_A_STEP, _DISTANCES_OF_A_STEP >> options.latents))
    for step in range(options.steps):
        seen = torch.randint(len(pieces), (n_pieces,), generator=generator).to(pieces.device)
        points, weights = pieces[seen], shares[seen]
        with torch.no_grad():
            chosen = codes[nearest_by_place(points, weights, decoded(decoder, codes))]
        with torch.enable_grad():
            off = (decoded(decoder, chosen) - points).square()
            loss = (off * weights).sum() / weights.sum()
            gradients = torch.autograd.grad(loss, list(decoder.values()))
        adam.step(gradients, _RATE * (1 - step / options.steps))
    return {name: stored(tensor.detach()) for name, tensor in decoder.items()}


class _Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980); torch's takes seconds to import."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._n_steps = tensors, 0
        self._means = [torch.zeros_like(tensor) for tensor in tensors]
        self._squares = [torch.zeros_like(tensor) for tensor in tensors]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Move the tensors downhill."""
        self._n_steps += 1
        every = zip(self._tensors, gradients, self._means, self._squares, strict=True)
        for tensor, gradient, mean, square in every:
            mean.lerp_(gradient, 1 - _MEAN)
            square.lerp_(gradient.square(), 1 - _SQUARE)
            size = (square / (1 - _SQUARE**self._n_steps)).sqrt_().add_(_EPSILON)
            tensor.sub_(mean / (1 - _MEAN**self._n_steps) / size, alpha=rate)


def first_decoder(options: AutoencoderOptions, generator: torch.Generator) -> dict[str, Tensor]:
    """Where training starts: each place in binary, and a bend that adds nothing."""
    places = torch.arange(options.latents)
    linear = torch.zeros(options.piece, options.latents)
    linear[places % options.piece, places] = 0.5 ** (places // options.piece)
    length = linear.norm(dim=1, keepdim=True).clamp(min=TINY)
    noise = torch.randn(linear.shape, generator=generator)
    found = {f"{DECODER}linear": _SPREAD * linear / length + _NOISE * noise}
    if options.hidden:
        wide = torch.randn(options.hidden, options.latents, generator=generator)
        found[f"{DECODER}inner"] = wide / options.latents**0.5
        found[f"{DECODER}bias"] = torch.randn(options.hidden, generator=generator) / 2
        found[f"{DECODER}outer"] = torch.zeros(options.piece, options.hidden)
    return found


def sample(problems: Sequence[LayerProblem], piece: int) -> tuple[Tensor, Tensor]:
    """Pieces (n, piece) of the layers, their rows of length one, and what errors there count.

    An error counts by the root of what its input counts in its layer (diag(H)) and of how long the
    row is: by these themselves, few pieces would decide.
    """
    pieces, shares = [], []
    for problem in problems:
        o, d = problem.weight.shape
        n_rows = min(o, -(-_PIECES_SEEN * piece // (d * len(problems))))
        rows = torch.arange(n_rows, device=problem.weight.device) * o // n_rows
        weight, scales = problem.weight[rows], row_scales(problem.weight)[rows]
        lengths = scales.square() / scales.square().mean().clamp(min=TINY)
        importance = (problem.importance / problem.importance.mean()).sqrt()
        pieces.append((weight / scales[:, None]).view(-1, piece))
        shares.append((lengths.sqrt()[:, None] * importance).view(-1, piece))
    return torch.cat(pieces), torch.cat(shares)


def row_scales(weight: Tensor) -> Tensor:
    """Root mean square of each row, (o,), storable and above zero."""
    return weight.square().mean(1).sqrt().clamp(2.0**-24, _FP16_MAX)


def nearest(points: Tensor, codewords: Tensor) -> Tensor:
    """Index (n,) of the nearest of the codewords (K, piece) to each of the points (n, piece)."""
    return _least(points, codewords.square().sum(1) / 2, -codewords)


def nearest_by_place(points: Tensor, shares: Tensor, codewords: Tensor) -> Tensor:
    """As `nearest`, an error at each place of each point counting as `shares` (n, piece) say."""
    both = torch.cat([shares / 2, shares * points], 1)
    return _least(
        both, torch.zeros_like(codewords[:, 0]), torch.cat([codewords.square(), -codewords], 1)
    )


def _least(points: Tensor, offsets: Tensor, directions: Tensor) -> Tensor:
    """Index (n,) of the least of ``offset + direction . point``."""
    n_points = max(1, _DISTANCES_AT_ONCE // len(offsets))
    parts = [torch.addmm(offsets, p, directions.T).argmin(1) for p in torch.split(points, n_points)]
    return torch.cat(parts)


def stored(tensor: Tensor) -> Tensor:
    """In float16, the largest of which stands for what is beyond."""
    return tensor.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16)
