"""Compress a layer by a scheme, know its size from shapes, and get the matrix back.

Stages compose as width, transform, factorize, sparsify, quantize, residual. Factors A (o, r) and
B (r, d) are each sparsified and quantized like a layer of their own: B sees the layer's inputs, so
H is its own; A sees what the compressed B puts out, so its statistics are ``B H B^T``, exactly. A
transform gives all stages after it another basis of the inputs; a residual gives those before it
another target. A change of width gives all the others a smaller layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import Footprint
from autocompress.core.layer import LayerSpec
from autocompress.core.scheme import Scheme
from autocompress.methods.problem import LayerProblem, LayerStatistics
from autocompress.methods.schemes import Plan, check, narrowed_layer, own_tensors, plan
from autocompress.methods.slices import decode_matrix
from autocompress.methods.storage import RESIDUAL, TRANSFORM, WIDTH, under

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

    def to(self, device: torch.device) -> CompressedWeight:
        """The same, its tensors on `device`; those that are there are shared."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)


def compress(
    weight: Tensor,
    scheme: Scheme,
    statistics: LayerStatistics,
    *,
    problem: LayerProblem | None = None,
    reader: LayerProblem | None = None,
) -> CompressedWeight:
    """Compress `weight` by `scheme`; `weight` is not written, and repeats are equal bit for bit.

    Args:
        weight: (o, d), any floating dtype.
        scheme: need not be canonical.
        statistics: of the layer's input; `LayerStatistics.none()` if there are none.
        problem: of this very weight and statistics, if the caller compresses the layer by several
            schemes and wants them to share decompositions.
        reader: of the layer that says which of this one's outputs go, where the scheme removes
            some; see `reader`.

    Raises:
        SchemeError: the scheme is malformed or shares with other layers, shapes do not fit, or it
            needs a reader and has none.
        ModelError: weight or statistics are not finite.
    """
    ready = plan(scheme)
    if ready.sharing is not None:
        raise SchemeError(
            f"Layers that share are compressed together, by compress_together, but got {scheme} "
            "for one layer."
        )
    problem = problem or LayerProblem(weight, statistics)
    o, d = problem.weight.shape
    if ready.width is None:
        tensors, notes = _compress_in_basis(problem, ready, weight, weight.dtype)
    else:
        tensors, notes = _compress_narrow(problem, ready, weight, reader)
    return CompressedWeight((o, d), weight.dtype, ready.scheme, tensors, notes)


Found = tuple[dict[str, Tensor], tuple[str, ...]]
"""Tensors to store, and notes."""


def _compress_narrow(
    problem: LayerProblem, ready: Plan, weight: Tensor, reader: LayerProblem | None
) -> Found:
    """Neurons or heads go, then the rest of the scheme on what is left."""
    assert ready.width is not None  # the caller has checked
    step = ready.width
    found = step.method.narrowed(problem, weight, step.options, reader)
    tensors, more = _compress_in_basis(found.problem, ready.inside, found.exact, weight.dtype)
    stored = {f"{WIDTH}{name}": tensor for name, tensor in found.stored.items()}
    return stored | tensors, (*found.notes, *more)


def _compress_in_basis(
    problem: LayerProblem, ready: Plan, exact: Tensor, dtype: torch.dtype
) -> Found:
    if ready.transform is None:
        return _compress_parts(problem, ready, exact, dtype)
    step, shape = ready.transform, _shape(problem.weight)

    def compressed(moved: LayerProblem) -> Tensor:
        return _decode_parts(_compress_parts(moved, ready, moved.weight, dtype)[0], ready, shape)

    stored, notes = step.method.fit(problem, step.options, compressed)
    moved = step.method.apply(problem, stored, step.options)
    tensors, more = _compress_parts(moved, ready, moved.weight, dtype)
    return tensors | {f"{TRANSFORM}{name}": t for name, t in stored.items()}, (*notes, *more)


def _compress_parts(problem: LayerProblem, ready: Plan, exact: Tensor, dtype: torch.dtype) -> Found:
    """The stages between transform and residual, and the residual."""
    if ready.residual is None:
        return compress_main(problem, ready, exact, dtype)
    step, shape = ready.residual, _shape(exact)
    main = _Main(problem, ready, dtype)
    part, target, notes = step.method.fit(
        problem, step.options, lambda target: decode_main(main(target)[0], ready, shape), dtype
    )
    tensors, more = main(target)
    return tensors | {f"{RESIDUAL}{name}": t for name, t in part.items()}, (*more, *notes)


class _Main:
    """The main stages on targets of one layer; remembers the last."""

    def __init__(self, problem: LayerProblem, ready: Plan, dtype: torch.dtype) -> None:
        self._problem, self._ready, self._dtype = problem, ready, dtype
        self._last: tuple[Tensor, Found] | None = None

    def __call__(self, target: Tensor) -> Found:
        if self._last is None or self._last[0] is not target:
            problem = self._problem
            if target is not problem.weight:  # else decompositions stay shared
                problem = problem.with_weight(target)
            self._last = target, compress_main(problem, self._ready, target, self._dtype)
        return self._last[1]


def compress_main(problem: LayerProblem, ready: Plan, exact: Tensor, dtype: torch.dtype) -> Found:
    """The stages from factorize to quantize; `exact` as for `compress_matrix`."""
    if ready.factorize is None:
        return compress_matrix(problem, ready, exact, dtype)
    return _compress_factors(problem, ready, dtype)


def _compress_factors(problem: LayerProblem, ready: Plan, dtype: torch.dtype) -> Found:
    assert ready.factorize is not None  # the caller has checked
    step = ready.factorize
    outer, inner, notes = step.method.factorize(problem, step.options)
    problem_b = LayerProblem(inner, problem.statistics)
    tensors_b, notes_b = compress_matrix(problem_b, ready, inner, dtype)
    decoded = ready.storage((inner.shape[0], inner.shape[1])).decode(tensors_b).float()
    statistics = through(problem, decoded)
    if ready.sparsify is not None or ready.quantize is not None:
        outer = refitted(problem, decoded, statistics, outer)
    problem_a = LayerProblem(outer, statistics)
    tensors_a, notes_a = compress_matrix(problem_a, ready, outer, dtype)
    tensors = {f"a.{name}": t for name, t in tensors_a.items()}
    tensors |= {f"b.{name}": t for name, t in tensors_b.items()}
    notes += tuple(f"factor b: {n}" for n in notes_b) + tuple(f"factor a: {n}" for n in notes_a)
    return tensors, notes


def through(problem: LayerProblem, inner: Tensor) -> LayerStatistics:
    """Statistics of ``B x``: ``B H B^T``."""
    if problem.hessian is None:
        return LayerStatistics.none()
    inner = inner.double()
    hessian = (inner @ problem.hessian.double() @ inner.T).float()
    return LayerStatistics((hessian + hessian.T) / 2, problem.n_tokens, problem.statistics.digest)


def refitted(
    problem: LayerProblem, inner: Tensor, statistics: LayerStatistics, outer: Tensor
) -> Tensor:
    """The A that makes up best for what compression did to B: ``W H B^T (B H B^T)^-1``.

    `outer` is kept if there is no H, or ``B H B^T`` is singular.
    """
    if problem.hessian is None or statistics.hessian is None:
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


def compress_matrix(problem: LayerProblem, ready: Plan, exact: Tensor, dtype: torch.dtype) -> Found:
    """Sparsify and quantize; `exact` is the matrix in all its digits, `dtype` that of values."""
    mask: Tensor | None = None
    notes: tuple[str, ...] = ()
    storage, quantize = ready.storage(_shape(exact)), ready.quantize
    if ready.sparsify is not None:
        step = ready.sparsify
        mask, notes = step.method.mask(problem, step.options)
        refitted = step.method.values(problem, mask, step.options)
        if refitted is not None:
            exact, problem = refitted, problem.with_weight(refitted)
    if quantize is None:
        values = exact.detach() if mask is None else exact.detach().masked_fill(~mask, 0.0)
        return storage.encode(values, mask, dtype), notes
    quantized = quantize.method.quantize(problem, mask, quantize.options)
    return storage.encode(quantized, mask, dtype), (*notes, *quantized.notes)


def footprint(layer: LayerSpec, scheme: Scheme) -> Footprint:
    """What `layer` stores and computes under `scheme`, from shapes alone.

    Zeros are computed with like any weight. A factorized embedding multiplies the looked-up row by
    its second factor. Of layers that share, the first stores what they share and the others borrow
    it; each multiplies by it with its own inputs.

    Raises:
        SchemeError: see `check`.
    """
    check(layer, scheme)
    ready = plan(scheme)
    if ready.width is not None:
        inside = footprint(narrowed_layer(layer, ready), ready.inside.scheme)
        kept = ready.width.method.layout(ready.width.options)
        stored = {f"{WIDTH}{name}": layout for name, layout in kept.items()}
        return Footprint({**stored, **inside.tensors}, inside.macs_per_token)
    whole = (layer.out_features, layer.in_features)
    tensors = {
        f"{prefix}{name}": layout
        for prefix, shape in ready.matrices(whole).items()
        for name, layout in ready.storage(shape).layout(layer.dtype).items()
    }
    macs = layer.macs_per_token if tensors else 0
    if ready.rank is not None:
        lookup = ready.rank * whole[1] if layer.kind == "embedding" else 0
        macs = macs * ready.rank * sum(whole) // (whole[0] * whole[1]) + lookup
    extra = 0
    if ready.transform is not None:
        method, options = ready.transform.method, ready.transform.options
        stored = method.layout(whole, options)
        tensors |= {f"{TRANSFORM}{name}": layout for name, layout in stored.items()}
        extra += method.macs_per_token(whole, options)
    if ready.residual is not None:
        part, options = ready.residual.method, ready.residual.options
        stored = part.layout(whole, options, layer.dtype)
        tensors |= {f"{RESIDUAL}{name}": layout for name, layout in stored.items()}
        extra += part.macs_per_token(whole, options)
    own = own_tensors(layer.name, scheme, tensors)
    borrowed = {name: layout for name, layout in tensors.items() if name not in own}
    macs += extra if layer.expert is None else layer.expert.active(extra)
    return Footprint(own, macs, borrowed)


def decode(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The (o, d) matrix of stored `tensors`, computed in float32, returned in `dtype`.

    Plain values of that dtype come back without a copy: do not write to the result.
    """
    ready = plan(scheme)
    if ready.width is not None:
        narrow = decode(tensors, ready.inside.scheme, ready.narrow(shape), dtype)
        step = ready.width
        return step.method.widened(narrow, under(WIDTH, tensors), shape, step.options)
    if ready.rank is None and ready.residual is None:
        undone = partial(_undone, tensors=tensors, ready=ready)
        return decode_matrix(ready.storage(shape), tensors, dtype, undone)
    matrix = _decode_parts(tensors, ready, shape)
    return _undone(matrix, tensors, ready).to(dtype)


def decode_rows(
    tensors: Mapping[str, Tensor],
    scheme: Scheme,
    shape: tuple[int, int],
    rows: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the matrix, (len(rows), d): what an embedding looks up, without the rest.

    Equal to ``decode(...)[rows]``; for matrix products up to rounding. A layout in which rows do
    not start on a byte, or that has a mask, a residual or another width, is decoded as a whole.
    """
    ready = plan(scheme)
    if ready.residual is not None or ready.width is not None:
        return decode(tensors, scheme, shape, dtype)[rows]
    if ready.rank is None:
        found = ready.storage(shape).decode_rows(tensors, rows)
    else:
        storage = {p: ready.storage(s) for p, s in ready.matrices(shape).items()}
        outer = storage["a."].decode_rows(tensors, rows, "a.")
        found = outer.float() @ storage["b."].decode(tensors, "b.").float()
    return _undone(found, tensors, ready).to(dtype)


def unread_rows(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
) -> Tensor | None:
    """(o,) bool, True at outputs that are gone because nothing reads them; None if all are read."""
    step = plan(scheme).width
    if step is None or not step.options.cuts_outputs:
        return None
    left = step.method.left(under(WIDTH, tensors), shape[0], step.options)
    return torch.ones(shape[0], dtype=torch.bool).to(left.device).index_fill_(0, left, False)


def _decode_parts(tensors: Mapping[str, Tensor], ready: Plan, shape: tuple[int, int]) -> Tensor:
    """What `_compress_parts` represents, (o, d)."""
    matrix = decode_main(tensors, ready, shape)
    if ready.residual is None:
        return matrix
    step = ready.residual
    stored = under(RESIDUAL, tensors)
    return matrix.float() + step.method.values(stored, shape, step.options)


def decode_main(tensors: Mapping[str, Tensor], ready: Plan, shape: tuple[int, int]) -> Tensor:
    """What the stages from factorize to quantize represent, (o, d), in the basis they work in."""
    if ready.rank is None:
        return decode_matrix(ready.storage(shape), tensors, torch.float32)
    storage = {p: ready.storage(s) for p, s in ready.matrices(shape).items()}
    outer, inner = (storage[p].decode(tensors, p).to(torch.float32) for p in ("a.", "b."))
    return outer @ inner


def _undone(matrix: Tensor, tensors: Mapping[str, Tensor], ready: Plan) -> Tensor:
    if ready.transform is None:
        return matrix
    step = ready.transform
    return step.method.undo(matrix.float(), under(TRANSFORM, tensors), step.options)


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]
