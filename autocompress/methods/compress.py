"""Compress a layer by a scheme, know its size from shapes, and get the matrix back.

Stages compose as factorize, sparsify, quantize. Factors A (o, r) and B (r, d) are each sparsified
and quantized like a layer of their own: B sees the layer's inputs, so H is its own; A sees what
the compressed B puts out, so its statistics are ``B H B^T``, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.footprint import Footprint
from autocompress.core.layer import LayerSpec
from autocompress.core.scheme import Scheme
from autocompress.methods.problem import LayerProblem, LayerStatistics
from autocompress.methods.schemes import Plan, check, plan
from autocompress.methods.storage import MatrixStorage

_REFIT_DAMPING = 1e-4  # share of the mean diagonal


@dataclass(frozen=True, eq=False)
class CompressedWeight:
    """A compressed weight.

    Attributes:
        shape: (out_features, in_features).
        dtype: of the base weight.
        scheme: canonical.
        tensors: what a file stores, by name within the layer.
        notes: what methods have to say: fallbacks and their reasons.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: Scheme
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    def to_dense(self) -> Tensor:
        """The (o, d) matrix that the model computes with, in the base dtype."""
        return decode(self.tensors, self.scheme, self.shape, self.dtype)


def compress(
    weight: Tensor,
    scheme: Scheme,
    statistics: LayerStatistics,
    *,
    problem: LayerProblem | None = None,
) -> CompressedWeight:
    """Compress `weight` by `scheme`; `weight` is not written, and repeats are equal bit for bit.

    Args:
        weight: (o, d), any floating dtype.
        scheme: need not be canonical.
        statistics: of the layer's input; `LayerStatistics.none()` if there are none.
        problem: of this very weight and statistics, if the caller compresses the layer by several
            schemes and wants them to share decompositions.

    Raises:
        SchemeError: the scheme is malformed, or the shapes do not fit.
        ModelError: weight or statistics are not finite.
    """
    ready = plan(scheme)
    problem = problem or LayerProblem(weight, statistics)
    o, d = problem.weight.shape
    if ready.factorize is None:
        tensors, notes = _compress_matrix(problem, ready, weight, weight.dtype)
    else:
        tensors, notes = _compress_factors(problem, ready, weight.dtype)
    return CompressedWeight((o, d), weight.dtype, ready.scheme, tensors, notes)


def _compress_factors(
    problem: LayerProblem, ready: Plan, dtype: torch.dtype
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    assert ready.factorize is not None  # the caller has checked
    step = ready.factorize
    outer, inner, notes = step.method.factorize(problem, step.options)
    problem_b = LayerProblem(inner, problem.statistics)
    tensors_b, notes_b = _compress_matrix(problem_b, ready, inner, dtype)
    decoded = _storage((inner.shape[0], inner.shape[1]), ready).decode(tensors_b).float()
    statistics = _through(problem, decoded)
    if ready.sparsify is not None or ready.quantize is not None:
        outer = _refitted(problem, decoded, statistics, outer)
    problem_a = LayerProblem(outer, statistics)
    tensors_a, notes_a = _compress_matrix(problem_a, ready, outer, dtype)
    tensors = {f"a.{name}": t for name, t in tensors_a.items()}
    tensors |= {f"b.{name}": t for name, t in tensors_b.items()}
    notes += tuple(f"factor b: {n}" for n in notes_b) + tuple(f"factor a: {n}" for n in notes_a)
    return tensors, notes


def _through(problem: LayerProblem, inner: Tensor) -> LayerStatistics:
    """Statistics of ``B x``: ``B H B^T``."""
    if problem.hessian is None:
        return LayerStatistics.none()
    inner = inner.double()
    hessian = (inner @ problem.hessian.double() @ inner.T).float()
    return LayerStatistics((hessian + hessian.T) / 2, problem.n_tokens, problem.statistics.digest)


def _refitted(
    problem: LayerProblem, inner: Tensor, statistics: LayerStatistics, outer: Tensor
) -> Tensor:
    """The A that makes up best for what compression did to B: ``W H B^T (B H B^T)^-1``.

    `outer` is kept if there are too few tokens to trust H, or ``B H B^T`` is singular.
    """
    if problem.hessian is None or statistics.hessian is None or problem.too_few_tokens:
        return outer
    hessian = statistics.hessian.double()
    ridge = _REFIT_DAMPING * float(hessian.diagonal().mean())
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    lower, info = torch.linalg.cholesky_ex(hessian + ridge * identity)
    if int(info) != 0:
        return outer
    crossed = problem.weight.double() @ (problem.hessian.double() @ inner.double().T)
    # The ridge pulls towards `outer`, not towards zero.
    return torch.cholesky_solve((crossed + ridge * outer.double()).T, lower).T.float()


def _compress_matrix(
    problem: LayerProblem, ready: Plan, exact: Tensor, dtype: torch.dtype
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Sparsify and quantize; `exact` is the matrix in all its digits, `dtype` that of values."""
    mask: Tensor | None = None
    notes: tuple[str, ...] = ()
    if ready.sparsify is not None:
        mask, notes = ready.sparsify.method.mask(problem, ready.sparsify.options)
    storage = _storage((exact.shape[0], exact.shape[1]), ready)
    if ready.quantize is None:
        values = exact.detach() if mask is None else exact.detach().masked_fill(~mask, 0.0)
        return storage.encode(values, mask, dtype), notes
    quantized = ready.quantize.method.quantize(problem, mask, ready.quantize.options)
    return storage.encode(quantized, mask, dtype), (*notes, *quantized.notes)


def footprint(layer: LayerSpec, scheme: Scheme) -> Footprint:
    """What `layer` stores and computes under `scheme`, from shapes alone.

    Zeros are computed with like any weight. A factorized embedding multiplies the looked-up row
    by its second factor.

    Raises:
        SchemeError: see `check`.
    """
    check(layer, scheme)
    ready = plan(scheme)
    o, d, rank = layer.out_features, layer.in_features, ready.rank
    if rank is None:
        layout = _storage((o, d), ready).layout(layer.dtype)
        return Footprint(layout, layer.macs_per_token)
    factors = {"a.": (o, rank), "b.": (rank, d)}
    tensors = {
        f"{prefix}{name}": layout
        for prefix, shape in factors.items()
        for name, layout in _storage(shape, ready).layout(layer.dtype).items()
    }
    lookup = rank * d if layer.kind == "embedding" else 0
    return Footprint(tensors, layer.macs_per_token * rank * (o + d) // (o * d) + lookup)


def decode(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The (o, d) matrix of stored `tensors`, computed in float32, returned in `dtype`.

    Plain values of that dtype come back without a copy: do not write to the result.
    """
    ready = plan(scheme)
    if ready.rank is None:
        return _storage(shape, ready).decode(tensors).to(dtype)
    outer = _storage((shape[0], ready.rank), ready).decode(tensors, "a.").to(torch.float32)
    inner = _storage((ready.rank, shape[1]), ready).decode(tensors, "b.").to(torch.float32)
    return (outer @ inner).to(dtype)


def decode_rows(
    tensors: Mapping[str, Tensor],
    scheme: Scheme,
    shape: tuple[int, int],
    rows: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the matrix, (len(rows), d): what an embedding looks up, without the rest.

    Equal to ``decode(...)[rows]``; for factors up to the rounding of the matrix product. A layout
    in which rows do not start on a byte, or that has a mask, is decoded as a whole.
    """
    ready = plan(scheme)
    if ready.rank is None:
        return _storage(shape, ready).decode_rows(tensors, rows).to(dtype)
    outer = _storage((shape[0], ready.rank), ready).decode_rows(tensors, rows, "a.")
    inner = _storage((ready.rank, shape[1]), ready).decode(tensors, "b.")
    return (outer.to(torch.float32) @ inner.to(torch.float32)).to(dtype)


def _storage(shape: tuple[int, int], ready: Plan) -> MatrixStorage:
    sparsify, quantize = ready.sparsify, ready.quantize
    return MatrixStorage(
        shape,
        grid=None if quantize is None else quantize.options,
        n_kept=None if sparsify is None else sparsify.method.n_kept(shape, sparsify.options),
    )
