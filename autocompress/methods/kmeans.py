"""Non-uniform quantization: each row has the codebook that suits its weights.

SqueezeLLM (Kim et al. 2024, arXiv 2306.07629), equation 4, without its sparse part: k-means of the
weights of a row, each weighted by the importance of its input. In one dimension clusters are
intervals, so that a cost is a difference of running sums. The start is the best division of bins
of neighbouring weights, by dynamic programming (Wang and Song 2011, "Ckmeans.1d.dp"), and Lloyd's
iteration moves single weights from there. Errors are made up for as in GPTQ, see `gptq`, with the
nearest codeword in place of the nearest level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Coding, Quantized, Stored
from autocompress.methods.gptq import Sweep, compensate_pruned
from autocompress.methods.problem import DAMPING, InverseFactor, LayerProblem

_FP16_MAX = 65504.0
_BINS = 128
_COSTS_AT_ONCE = 1 << 18
_INDICES_AT_ONCE = 1 << 18
_OUTWEIGH = 1e5  # what pruned weights weigh together, in those kept
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class KMeansOptions:
    """Options of k-means.

    Attributes:
        bits: 2 to 6; a row stores 2^bits codewords.
        iterations: of Lloyd's algorithm, at most; 0 keeps the codewords that it starts from.
        compensate: make up for errors by the inputs that follow, as GPTQ does.
    """

    bits: int = 3
    iterations: int = 20
    compensate: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 6:
            raise SchemeError(
                f"bits must be 2 to 6, but got {self.bits}. "
                f"The nearest legal value is {min(max(self.bits, 2), 6)}."
            )
        if self.iterations < 0:
            raise SchemeError(
                f"iterations must be 0 or more, but got {self.iterations}. "
                "The nearest legal value is 0."
            )

    @property
    def n_codewords(self) -> int:
        """2^bits."""
        return 1 << self.bits


@dataclass(frozen=True, slots=True)
class CodebookCoding(Coding):
    """A codebook (o, 2^bits) float16, ascending in each row."""

    width: int

    @property
    def bits(self) -> int:
        """See `Coding.bits`."""
        return self.width

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:
        """See `Coding.parameters`."""
        return {"codebook": TensorLayout((shape[0], 1 << self.width), "float16")}

    def values(
        self,
        codes: Tensor,
        parameters: Stored,
        shape: tuple[int, int],  # noqa: ARG002
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `Coding.values`."""
        codebook = parameters["codebook"] if rows is None else parameters["codebook"][rows]
        values = torch.empty_like(codes, dtype=torch.float32)
        for part in _parts(codes):
            torch.gather(codebook[part].float(), 1, codes[part].long(), out=values[part])
        return values


class KMeans(Quantizer[KMeansOptions]):
    """One codebook per row."""

    needs = Needs.HESSIAN
    options = KMeansOptions
    summary = "a codebook for each row, by k-means weighted with the importance of the inputs"

    def coding(self, options: KMeansOptions) -> Coding:
        """See `Quantizer.coding`."""
        return CodebookCoding(options.bits)

    def quantize(
        self, problem: LayerProblem, mask: Tensor | None, options: KMeansOptions
    ) -> Quantized:
        """See `Quantizer.quantize`; with a mask one codeword of each row is exactly zero."""
        factor, notes = _factor(problem) if options.compensate else (None, ())
        shown = problem.weight
        if mask is not None and factor is not None:
            shown = compensate_pruned(problem.weight, mask, factor)
        codebook = fit(shown, problem.importance, mask, options)
        if factor is None:
            codes = nearest(problem.weight, mask, codebook)
        else:
            codes = compensated(problem.weight, mask, codebook, factor)
        return Quantized(codes, {"codebook": codebook.to(torch.float16)}, notes)


def _factor(problem: LayerProblem) -> tuple[InverseFactor | None, tuple[str, ...]]:
    factor, reason = problem.usable_factor(by_activation=True, damping=DAMPING)
    return factor, (f"kmeans did not compensate: {reason}",) if reason else ()


def nearest(weight: Tensor, mask: Tensor | None, codebook: Tensor) -> Tensor:
    """Codes (o, d) uint8 of the nearest codewords; of zero where `mask` is False."""
    codes, middles = torch.empty_like(weight, dtype=torch.uint8), _middles(codebook)
    for part in _parts(weight):
        codes[part] = torch.searchsorted(middles[part], weight[part])
    if mask is None:
        return codes
    return torch.where(mask, codes, _zero_codes(codebook).to(torch.uint8))


def compensated(
    weight: Tensor, mask: Tensor | None, codebook: Tensor, factor: InverseFactor
) -> Tensor:
    """As `nearest`, input by input, each after the errors of those before were made up for."""
    middles, order = _middles(codebook), factor.order
    kept = None if mask is None else mask.T[order].contiguous()
    zero, places = _zero_codes(codebook), order.tolist()
    codes = torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device)

    def settle(j: int, target: Tensor) -> Tensor:
        found = torch.searchsorted(middles, target[:, None])
        if kept is not None:
            found = torch.where(kept[j][:, None], found, zero)
        codes[places[j]] = found[:, 0]
        return codebook.gather(1, found)[:, 0]

    Sweep(weight.T[order].contiguous(), factor.upper, settle).run(0, len(order))
    return codes.T.contiguous()


def fit(weight: Tensor, importance: Tensor, mask: Tensor | None, options: KMeansOptions) -> Tensor:
    """Codebooks (o, 2^bits), ascending, float32 of float16 values.

    Least ``sum_j importance_j (w_j - c_j)^2`` over the kept weights of each row, c_j the nearest
    codeword; nearly, see the tests.

    Args:
        weight: (o, d) float32.
        importance: (d,) float32, positive.
        mask: (o, d) bool, True where the weight is kept; rows with pruned weights get a codeword
            that is zero. None: all are kept.
        options: bits and iterations.
    """
    o, d = weight.shape
    n_bins = min(_BINS, d)
    n_rows = max(1, _COSTS_AT_ONCE // max((n_bins + 1) ** 2, d))
    codebook = weight.new_empty(o, options.n_codewords)
    for start in range(0, o, n_rows):
        rows = slice(start, start + n_rows)
        line = _Line(weight[rows], importance, None if mask is None else mask[rows])
        codewords = _best_division(line, n_bins, options.n_codewords)
        codewords = _lloyd(line, codewords, options.iterations)
        codebook[rows] = codewords.clamp(-_FP16_MAX, _FP16_MAX)
    if mask is not None:
        closest = codebook.abs().argmin(1, keepdim=True)
        pruned = ~mask.all(1, keepdim=True)
        codebook.scatter_(1, closest, codebook.gather(1, closest).masked_fill(pruned, 0.0))
    return codebook.to(torch.float16).float()


class _Line:
    """The weights of each row in ascending order, with running sums over them.

    Pruned weights are points at zero that outweigh all others, so that a codeword is there.

    Attributes:
        points: (rows, d) float32.
        shares: what each point weighs where space is divided, (rows, d) float32: pruned, nothing.
        sums: of weights, weights times points, weights times squared points, of the first k
            points; each (rows, d + 1) float64.
    """

    def __init__(self, weight: Tensor, importance: Tensor, mask: Tensor | None) -> None:
        shares = heavy = importance.expand(weight.shape)
        if mask is not None:
            shares, weight = shares * mask, weight * mask
            n_pruned = (~mask).sum(1, keepdim=True).clamp(min=1)
            heavy = torch.where(mask, shares, _OUTWEIGH * shares.sum(1, keepdim=True) / n_pruned)
        self.points, order = weight.sort(dim=1)
        self.shares = shares.gather(1, order)
        masses, points = heavy.gather(1, order).double(), self.points.double()
        self.sums = tuple(_running(masses * points**power) for power in range(3))

    def at(self, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The running sums at `edges` (rows, n), places between 0 and d."""
        masses, firsts, seconds = (total.gather(1, edges) for total in self.sums)
        return masses, firsts, seconds


def _running(terms: Tensor) -> Tensor:
    return torch.nn.functional.pad(terms.cumsum(1), (1, 0))


def _best_division(line: _Line, n_bins: int, n_codewords: int) -> Tensor:
    """Codewords (rows, K) of the best division of bins into K intervals."""
    edges = _bin_edges(line, n_bins)
    costs = _costs(*line.at(edges))
    least = [costs[:, :, 0]]  # of the bins up to each edge, in 1, 2, ... intervals
    for _ in range(n_codewords - 1):
        least.append((least[-1][:, None] + costs).amin(-1))
    cuts = [torch.full_like(edges[:, :1], edges.shape[1] - 1)]
    for before in reversed(least[:-1]):
        into = costs.gather(1, cuts[-1][:, :, None].expand(-1, -1, costs.shape[2]))[:, 0]
        cuts.append((before + into).argmin(1, keepdim=True))
    cuts.append(torch.zeros_like(cuts[0]))
    found = line.at(edges.gather(1, torch.cat(cuts[::-1], 1)))
    return _means(found, torch.zeros_like(found[0][:, 1:])).float().sort(1).values


def _bin_edges(line: _Line, n_bins: int) -> Tensor:
    """Places (rows, n_bins + 1) that divide the points into bins of much the same cost.

    A point with share p and a distance g between its neighbours has density p / g, and the cost
    of cells is even where they are as dense as ``density^(1/3)`` (Panter and Dite 1951).
    """
    rows, d = line.points.shape
    if n_bins == d:
        return torch.arange(d + 1, device=line.points.device).repeat(rows, 1)
    gaps = line.points.diff(dim=1)
    gaps = torch.nn.functional.pad(gaps, (1, 0)) + torch.nn.functional.pad(gaps, (0, 1))
    masses = _running((line.shares * gaps.square()).double().pow(1 / 3))
    wanted = torch.arange(1, n_bins, device=masses.device) / n_bins * masses[:, -1:]
    inner = torch.searchsorted(masses, wanted)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=d)


def _costs(masses: Tensor, firsts: Tensor, seconds: Tensor) -> Tensor:
    """Squared error (rows, to, from) of one codeword for the points between two edges."""
    mass, first, second = (
        total[:, :, None] - total[:, None] for total in (masses, firsts, seconds)
    )
    costs = (second - first.square_().div_(mass.clamp(min=_TINY))).clamp_(min=0).float()
    backwards = torch.ones(costs.shape[1:], dtype=torch.bool, device=costs.device).triu(1)
    return costs.masked_fill_(backwards, torch.inf)


def _lloyd(line: _Line, codewords: Tensor, iterations: int) -> Tensor:
    """Codewords (rows, K) after at most `iterations` of assignment and averaging."""
    last, d = None, line.points.shape[1]
    for _ in range(iterations):
        inner = torch.searchsorted(line.points, _middles(codewords))
        if last is not None and torch.equal(inner, last):
            break
        last = inner
        edges = torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=d)
        codewords = _means(line.at(edges), codewords.double()).float()
    return codewords


def _means(sums: tuple[Tensor, Tensor, Tensor], empty: Tensor) -> Tensor:
    """Means (rows, K) between K + 1 edges; `empty` where nothing is between them."""
    mass, first = sums[0].diff(dim=1), sums[1].diff(dim=1)
    return torch.where(mass > 0, first / mass.clamp(min=_TINY), empty)


def _parts(matrix: Tensor) -> Iterator[slice]:
    """Rows, as many at once as their indices may take memory."""
    n_rows = max(1, _INDICES_AT_ONCE // matrix.shape[1])
    for start in range(0, len(matrix), n_rows):
        yield slice(start, start + n_rows)


def _middles(codebook: Tensor) -> Tensor:
    return (codebook[:, 1:] + codebook[:, :-1]) / 2


def _zero_codes(codebook: Tensor) -> Tensor:
    """The code of zero in each row, (o, 1)."""
    return codebook.abs().argmin(1, keepdim=True)


METHODS.add("kmeans", KMeans())
