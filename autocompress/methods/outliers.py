"""The few weights that quantize worst are kept in float16, apart from the rest.

`outlier_columns` keeps whole inputs (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339; OWQ, Lee et
al. 2024, arXiv 2306.02272): those with the largest ``H_jj sum_i w_ij^2``. The other stages see
zeros there, so that the scales of their groups shrink. As the kept columns P can be anything, they
make up for the error ``D = W - C`` in all others as well: ``P = D H_:S H_SS^-1``, least squares.

`outlier_weights` keeps single weights (SpQR, Dettmers et al. 2024, arXiv 2306.03078; SqueezeLLM,
Kim et al. 2024, arXiv 2306.07629): those with the largest ``H_jj (w_ij - c_ij)^2``, C being what
the other stages make of the whole weight. They then see zeros there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Multiplier, Needs, Residual
from autocompress.methods.coding import Damage, Stored
from autocompress.methods.problem import LayerProblem
from autocompress.methods.sparsity import keep_highest

_INDEX, _VALUES, _COUNTS = "index", "values", "counts"
_SHORT, _INT = 1 << 15, 1 << 31  # int16 holds indices below, int32 likewise
_RIDGE = 1e-6  # share of the mean diagonal
_FP16_MAX = 65504.0

Found = tuple[dict[str, Tensor], Tensor, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class OutlierOptions:
    """Options of both.

    Attributes:
        share: of the inputs, or weights, that are kept; above 0, at most 0.5. At least one is.
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise SchemeError(
                f"share must be above 0 and at most 0.5, but got {self.share}. "
                f"The nearest legal value is {0.5 if self.share > 0.5 else 0.001}."
            )

    def n_of(self, n: int) -> int:
        """How many of `n` are kept."""
        return max(1, round(self.share * n))


@dataclass(frozen=True, slots=True)
class OutlierWeightsOptions(OutlierOptions):
    """Options of `outlier_weights`.

    Attributes:
        share: of the weights that are kept; above 0, at most 0.5. At least one is.
    """

    share: float = 0.005


class OutlierColumns(Residual[OutlierOptions]):
    """The inputs that matter most, in float16."""

    needs = Needs.HESSIAN
    options = OutlierOptions
    summary = "keep the most important inputs in float16, fitted to the error of the rest"

    def layout(
        self,
        shape: tuple[int, int],
        options: OutlierOptions,
        dtype: str,  # noqa: ARG002
    ) -> dict[str, TensorLayout]:
        """See `Residual.layout`: their indices, ascending, and their columns."""
        n = options.n_of(shape[1])
        return {
            _INDEX: TensorLayout((n,), "int16" if shape[1] <= _SHORT else "int32"),
            _VALUES: TensorLayout((shape[0], n), "float16"),
        }

    def fit(
        self,
        problem: LayerProblem,
        options: OutlierOptions,
        compressed: Callable[[Tensor], Tensor],
        dtype: torch.dtype,  # noqa: ARG002
    ) -> Found:
        """See `Residual.fit`."""
        weight = problem.weight
        d = weight.shape[1]
        energies = problem.importance * weight.square().sum(0)
        index = keep_highest(energies[None], options.n_of(d))[0].nonzero()[:, 0]
        target = weight.index_fill(1, index, 0.0)
        notes: tuple[str, ...] = ()
        if problem.unseen:
            kept = weight[:, index]
            notes = (f"outlier_columns kept columns as they are: {problem.unseen}",)
        else:
            kept = _fitted(weight - compressed(target), problem, index)
        stored = {
            _INDEX: index.to(torch.int16 if d <= _SHORT else torch.int32),
            _VALUES: _half(kept),
        }
        return stored, target, notes

    def values(self, stored: Stored, shape: tuple[int, int], options: OutlierOptions) -> Tensor:  # noqa: ARG002
        """See `Residual.values`."""
        kept = stored[_VALUES].float()
        return kept.new_zeros(shape).index_copy_(1, stored[_INDEX].long(), kept)

    def multiplier(
        self,
        stored: Stored,
        shape: tuple[int, int],  # noqa: ARG002
        options: OutlierOptions,  # noqa: ARG002
    ) -> Multiplier:
        """See `Residual.multiplier`: the inputs of the columns, times these."""
        index, kept = stored[_INDEX].long(), stored[_VALUES].float()
        return Multiplier(lambda rows: rows[:, index] @ kept.T, index.nbytes + kept.nbytes)

    def damage(
        self,
        stored: Stored,
        shape: tuple[int, int],
        options: OutlierOptions,  # noqa: ARG002
    ) -> Damage | None:
        """See `Residual.damage`."""
        return _wrong_index(stored[_INDEX].long(), shape[1])

    def exact_inputs(self, stored: Stored, options: OutlierOptions) -> Tensor | None:  # noqa: ARG002
        """See `Residual.exact_inputs`: those that are kept."""
        return stored[_INDEX].long()

    def macs_per_token(self, shape: tuple[int, int], options: OutlierOptions) -> int:
        """See `Residual.macs_per_token`."""
        return shape[0] * options.n_of(shape[1])


class OutlierWeights(Residual[OutlierWeightsOptions]):
    """The weights that matter most, in float16.

    Beside each lies its place: an int32 index into the matrix, or, where that is smaller, its
    int16 column, with the number of kept weights of each row.
    """

    needs = Needs.DIAGONAL
    options = OutlierWeightsOptions
    summary = "keep the weights that quantize worst in float16, each with its place"

    def refusal(self, shape: tuple[int, int], options: OutlierWeightsOptions) -> str:
        """See `Method.refusal`."""
        if _by_row(shape, options) or shape[0] * shape[1] <= _INT:
            return ""
        least = (shape[0] + 1) / (shape[0] * shape[1])
        return (
            f"outlier_weights counts weights up to {_INT}, or rows of up to {_SHORT - 1} with more "
            f"than one kept weight each, but got share {options.share}. In rows that short, the "
            f"nearest legal value is {least:.2g}; else use outlier_columns."
        )

    def layout(
        self,
        shape: tuple[int, int],
        options: OutlierWeightsOptions,
        dtype: str,  # noqa: ARG002
    ) -> dict[str, TensorLayout]:
        """See `Residual.layout`: weights in row order and their places."""
        n = options.n_of(shape[0] * shape[1])
        values = {_VALUES: TensorLayout((n,), "float16")}
        if not _by_row(shape, options):
            return {_INDEX: TensorLayout((n,), "int32"), **values}
        counts = {_COUNTS: TensorLayout((shape[0],), "int16")}
        return {_INDEX: TensorLayout((n,), "int16"), **counts, **values}

    def fit(
        self,
        problem: LayerProblem,
        options: OutlierWeightsOptions,
        compressed: Callable[[Tensor], Tensor],
        dtype: torch.dtype,  # noqa: ARG002
    ) -> Found:
        """See `Residual.fit`."""
        weight = problem.weight
        shape = (weight.shape[0], weight.shape[1])
        scores = problem.importance * (weight - compressed(weight)).square()
        n = options.n_of(weight.numel())
        mask = keep_highest(scores.view(1, -1), n).view(shape)
        values = {_VALUES: _half(weight[mask])}
        target = weight.masked_fill(mask, 0.0)
        if not _by_row(shape, options):
            places = mask.view(-1).nonzero()[:, 0]
            return {_INDEX: places.to(torch.int32), **values}, target, ()
        counts = {_COUNTS: mask.sum(1, dtype=torch.int16)}
        columns = mask.nonzero()[:, 1]
        return {_INDEX: columns.to(torch.int16), **counts, **values}, target, ()

    def values(
        self, stored: Stored, shape: tuple[int, int], options: OutlierWeightsOptions
    ) -> Tensor:
        """See `Residual.values`."""
        places, kept = _places(stored, shape, options), stored[_VALUES].float()
        return kept.new_zeros(shape[0] * shape[1]).index_copy_(0, places, kept).view(shape)

    def multiplier(
        self, stored: Stored, shape: tuple[int, int], options: OutlierWeightsOptions
    ) -> Multiplier:
        """See `Residual.multiplier`: a sparse product."""
        places, kept = _places(stored, shape, options), stored[_VALUES].float()
        rows = torch.bincount(places // shape[1], minlength=shape[0]).cumsum(0)
        starts, columns = functional.pad(rows, (1, 0)), places % shape[1]
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Sparse (CSR tensor support|invariant checks)", UserWarning
            )
            sparse = torch.sparse_csr_tensor(
                starts, columns, kept, size=shape, check_invariants=True
            )
        n_bytes = starts.nbytes + columns.nbytes + kept.nbytes
        return Multiplier(lambda inputs: (sparse @ inputs.T).T, n_bytes)

    def damage(
        self, stored: Stored, shape: tuple[int, int], options: OutlierWeightsOptions
    ) -> Damage | None:
        """See `Residual.damage`."""
        places = stored[_INDEX].long()
        if not _by_row(shape, options):
            return _wrong_index(places, shape[0] * shape[1])
        counts = stored[_COUNTS].long()
        if int(counts.min()) < 0 or int(counts.sum()) != len(places):
            rule = f"must be at least 0 and add up to {len(places)}"
            return Damage(_COUNTS, f"{rule}, but add up to {int(counts.sum())}")
        if int(places.min()) < 0 or int(places.max()) >= shape[1]:
            return _wrong_index(places, shape[1])
        starts = torch.arange(shape[0], device=places.device) * shape[1]
        return _wrong_index(places + starts.repeat_interleave(counts), shape[0] * shape[1])

    def macs_per_token(self, shape: tuple[int, int], options: OutlierWeightsOptions) -> int:
        """See `Residual.macs_per_token`."""
        return options.n_of(shape[0] * shape[1])


def _places(stored: Stored, shape: tuple[int, int], options: OutlierWeightsOptions) -> Tensor:
    """Where the entries stand in the matrix, row after row, (k,) int64."""
    places = stored[_INDEX].long()
    if not _by_row(shape, options):
        return places
    starts = torch.arange(shape[0], device=places.device) * shape[1]
    return places + starts.repeat_interleave(stored[_COUNTS].long())


def _wrong_index(places: Tensor, n: int) -> Damage | None:
    """Places (k,) int64 must ascend from 0 to `n` - 1."""
    least, most = int(places.min()), int(places.max())
    if least >= 0 and most < n and bool((places[1:] > places[:-1]).all()):
        return None
    return Damage(_INDEX, f"must ascend within 0 to {n - 1}, but is not so from {least} to {most}")


def _fitted(error: Tensor, problem: LayerProblem, index: Tensor) -> Tensor:
    """The columns (o, k) that make up best for an error D (o, d): ``D H_:S H_SS^-1``.

    The ridge pulls towards the error in those columns, not towards zero.
    """
    assert problem.hessian is not None  # the caller has checked
    shown = problem.hessian[:, index].double()
    inner = shown[index]
    ridge = _RIDGE * float(inner.diagonal().mean())
    damped = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        return error[:, index]
    crossed = error.double() @ shown + ridge * error[:, index].double()
    return torch.cholesky_solve(crossed.T, lower).T.float()


def _half(values: Tensor) -> Tensor:
    return values.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16).contiguous()


def _by_row(shape: tuple[int, int], options: OutlierWeightsOptions) -> bool:
    """Columns and counts per row are smaller than indices into the matrix."""
    return shape[1] < _SHORT and options.n_of(shape[0] * shape[1]) > shape[0]


METHODS.add("outlier_columns", OutlierColumns())
METHODS.add("outlier_weights", OutlierWeights())
