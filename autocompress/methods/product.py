"""Product quantization: one code for several consecutive weights, one codebook for the matrix.

The codec of iPQ (Stock et al. 2020, arXiv 1907.05686; Fan et al. 2020, arXiv 2004.07320, section
3.2) without its training: k-means of sub-vectors of consecutive inputs, where an error counts as
much as its input does (diag(H)). Codewords that no sub-vector chose take the worst represented
one of the most popular codeword.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Coding, Quantized, Stored
from autocompress.methods.problem import LayerProblem

_BLOCKS = (2, 4, 8, 16)
_CODEWORDS = (16, 32, 64, 128, 256)
_FP16_MAX = 65504.0
_DISTANCES_AT_ONCE = 1 << 20
_SEEN_PER_CODEWORD = 256  # sub-vectors that k-means works on, in whole rows; the last step has all


@dataclass(frozen=True, slots=True)
class ProductOptions:
    """Options of product quantization.

    Attributes:
        block: weights of a sub-vector: 2, 4, 8 or 16; it must divide the number of inputs.
        codewords: of the codebook: 16, 32, 64, 128 or 256.
        iterations: of k-means, at most.
        seed: of the first codewords.
    """

    block: int = 4
    codewords: int = 256
    iterations: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, legal in (
            ("block", self.block, _BLOCKS),
            ("codewords", self.codewords, _CODEWORDS),
        ):
            if value not in legal:
                close = min(legal, key=lambda other: abs(other - value))
                raise SchemeError(
                    f"{name} must be one of {', '.join(map(str, legal))}, but got {value}. "
                    f"The nearest legal value is {close}."
                )
        if self.iterations < 0:
            raise SchemeError(
                f"iterations must be 0 or more, but got {self.iterations}. "
                "The nearest legal value is 0."
            )


@dataclass(frozen=True, slots=True)
class ProductCoding(Coding):
    """Codes of sub-vectors, and the codebook (codewords, block) float16."""

    block: int
    codewords: int
    maskable: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        """See `Coding.bits`."""
        return self.codewords.bit_length() - 1

    def codes_per_row(self, in_features: int) -> int:
        """See `Coding.codes_per_row`."""
        return in_features // self.block

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:  # noqa: ARG002
        """See `Coding.parameters`."""
        return {"codebook": TensorLayout((self.codewords, self.block), "float16")}

    def values(
        self,
        codes: Tensor,
        parameters: Stored,
        shape: tuple[int, int],  # noqa: ARG002
        rows: Tensor | None = None,  # noqa: ARG002 - all rows share the codebook
    ) -> Tensor:
        """See `Coding.values`."""
        return parameters["codebook"].float()[codes.int()].flatten(1)


class ProductQuantizer(Quantizer[ProductOptions]):
    """One codebook of sub-vectors per matrix."""

    needs = Needs.DIAGONAL
    options = ProductOptions
    summary = "product quantization: a codebook of sub-vectors, by importance-weighted k-means"

    def refusal(self, shape: tuple[int, int], options: ProductOptions) -> str:
        """See `Method.refusal`."""
        if shape[1] % options.block == 0:
            return ""
        legal = [block for block in _BLOCKS if shape[1] % block == 0]
        close = min(legal, key=lambda block: abs(block - options.block), default=None)
        return (
            f"the block of product must divide the {shape[1]} inputs, but got {options.block}. "
            + (f"The nearest legal value is {close}." if close else "Take another method.")
        )

    def coding(self, options: ProductOptions) -> Coding:
        """See `Quantizer.coding`."""
        return ProductCoding(options.block, options.codewords)

    def quantize(
        self,
        problem: LayerProblem,
        mask: Tensor | None,  # noqa: ARG002 - the coding is not maskable
        options: ProductOptions,
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        o, d = problem.weight.shape
        n_seen = min(o, -(-_SEEN_PER_CODEWORD * options.codewords * options.block // d))
        rows = torch.arange(n_seen, device=problem.weight.device) * o // n_seen
        seen = SubVectors(problem.weight[rows], problem.importance, options.block)
        codebook = stored(first_codewords(seen, options.codewords, options.seed))
        codebook = lloyd(seen, codebook, options.iterations)
        every = SubVectors(problem.weight, problem.importance, options.block)
        codebook = lloyd(every, codebook, min(options.iterations, 1))
        codes = every.assign(codebook).codes.to(torch.uint8).view(o, -1)
        return Quantized(codes, {"codebook": codebook.to(torch.float16)})


@dataclass(frozen=True, eq=False)
class Assignment:
    """Codes (n,) int64 of the nearest codewords, and the squared errors (n,) float32."""

    codes: Tensor
    errors: Tensor


class SubVectors:
    """The sub-vectors of a matrix, row by row.

    Attributes:
        points: (n, block) float32, n = o d / block.
        shares: what an error counts at each place, (d / block, block) float32, in the order in
            which places follow each other in a row.
    """

    def __init__(self, weight: Tensor, importance: Tensor, block: int) -> None:
        self.points = weight.view(-1, block)
        self.shares = importance.view(-1, block) / importance.mean()

    def assign(self, codebook: Tensor) -> Assignment:
        """The nearest of the codewords (K, block) for each sub-vector."""
        n, places = len(self.points), len(self.shares)
        codes = torch.empty(n, dtype=torch.int64, device=self.points.device)
        errors = torch.empty(n, device=self.points.device)
        # |w - c|^2 = |w|^2 - 2 w c + |c|^2, of which the last depends on the place alone
        lengths = self.shares @ codebook.square().T
        n_rows = max(1, _DISTANCES_AT_ONCE // (places * len(codebook)))
        for start in range(0, n, n_rows * places):
            part = slice(start, min(start + n_rows * places, n))
            points = self.points[part].view(-1, places, self.shares.shape[1])
            distances = torch.add(lengths, (points * self.shares) @ codebook.T, alpha=-2)
            codes[part] = distances.argmin(-1).view(-1)
            off = points - codebook[codes[part]].view(points.shape)
            errors[part] = off.square_().mul_(self.shares).sum(-1).view(-1)
        return Assignment(codes, errors)


def lloyd(vectors: SubVectors, codebook: Tensor, iterations: int) -> Tensor:
    """Codewords (K, block) after at most `iterations` of assignment and averaging."""
    for _ in range(iterations):
        updated = stored(improved(vectors, codebook, vectors.assign(codebook)))
        if torch.equal(updated, codebook):
            break
        codebook = updated
    return codebook


def first_codewords(vectors: SubVectors, n_codewords: int, seed: int) -> Tensor:
    """Sub-vectors (K, block) far from each other, by k-means++ (Arthur and Vassilvitskii 2007).

    Each is drawn with a probability in proportion to its error by those before; where nothing is
    left to represent, the last is repeated.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(n_codewords, generator=generator, dtype=torch.float64)
    points = vectors.points
    shares = vectors.shares.repeat(len(points) // len(vectors.shares), 1)
    errors = shares.mean(1)  # the first: by importance
    codewords = points.new_empty(n_codewords, points.shape[1])
    for k in range(n_codewords):
        running = errors.double().cumsum(0)
        wanted = (draws[k].to(running.device) * running[-1]).reshape(1)
        found = torch.searchsorted(running, wanted, right=True).clamp(max=len(points) - 1)
        codewords[k] = points[found[0]]
        off = (points - codewords[k]).square_().mul_(shares).sum(1)
        errors = off if k == 0 else torch.minimum(errors, off)
    return codewords


def improved(vectors: SubVectors, codebook: Tensor, assignment: Assignment) -> Tensor:
    """Weighted means (K, block) of the sub-vectors that chose each codeword."""
    k, block = codebook.shape
    n, places = len(vectors.points), len(vectors.shares)
    mass, moment = (codebook.new_zeros(k, block, dtype=torch.float64) for _ in range(2))
    n_rows = max(1, _DISTANCES_AT_ONCE // (places * block))
    for start in range(0, n, n_rows * places):
        part = slice(start, min(start + n_rows * places, n))
        shares = vectors.shares.double().repeat((part.stop - part.start) // places, 1)
        mass.index_add_(0, assignment.codes[part], shares)
        moment.index_add_(0, assignment.codes[part], shares * vectors.points[part])
    means = torch.where(mass > 0, moment / mass.clamp(min=1e-300), codebook.double()).float()
    return _split(vectors, means, assignment)


def _split(vectors: SubVectors, means: Tensor, assignment: Assignment) -> Tensor:
    """Codewords that nobody chose take the worst represented followers of the most popular one."""
    followers = torch.bincount(assignment.codes, minlength=len(means))
    errors = assignment.errors.clone()
    for empty in (followers == 0).nonzero()[:, 0].tolist():
        popular = int(followers.argmax())
        worst = int(errors.where(assignment.codes == popular, -1.0).argmax())
        means[empty] = vectors.points[worst]
        errors[worst] = 0.0
        followers[popular] -= 1
    return means


def stored(codebook: Tensor) -> Tensor:
    """The float16 values that a file holds, as float32."""
    return codebook.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16).float()


METHODS.add("product", ProductQuantizer())
