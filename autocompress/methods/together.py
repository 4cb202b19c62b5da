"""Compress layers that share, together: what is common once, what is each layer's own by itself.

Every layer's result holds all that it decodes from, the shared tensors among them, under the names
that a layer of its own would have; so one decodes like any other. In a file, and in a footprint,
the first layer alone stores what is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods.base import Residual
from autocompress.methods.compress import (
    CompressedWeight,
    Found,
    compress_main,
    compress_matrix,
    decode_main,
    refitted,
    through,
)
from autocompress.methods.problem import LayerProblem, LayerStatistics
from autocompress.methods.schemes import Plan, Step, plan
from autocompress.methods.sharing import SharedQuantizer, Tie, pooled
from autocompress.methods.storage import RESIDUAL


def compress_together(
    weights: Sequence[Tensor],
    scheme: Scheme,
    statistics: Sequence[LayerStatistics],
    *,
    problems: Sequence[LayerProblem] | None = None,
) -> tuple[CompressedWeight, ...]:
    """Compress layers that share by the scheme that all of them have; see `compress`.

    Args:
        weights: (o, d) each, equal in shape and dtype, in the order of the blocks or
            experts of the scheme.
        scheme: names as many; need not be canonical.
        statistics: of the layers' inputs.
        problems: of these very weights and statistics, if the caller has them already.

    Raises:
        SchemeError: the scheme is malformed or does not share, or the layers do not fit it.
        ModelError: a weight or its statistics are not finite.
    """
    ready = plan(scheme)
    _require_alike(ready, weights)
    if problems is None:
        problems = [LayerProblem(w, s) for w, s in zip(weights, statistics, strict=True)]
    dtype = weights[0].dtype
    o, d = weights[0].shape
    found = _with_residuals(problems, ready, _shared(problems, ready, dtype), dtype)
    return tuple(
        CompressedWeight((o, d), dtype, ready.scheme, tensors, notes) for tensors, notes in found
    )


def _require_alike(ready: Plan, weights: Sequence[Tensor]) -> None:
    n_layers = len(ready.numbers)
    kinds = {(tuple(weight.shape), weight.dtype) for weight in weights}
    if n_layers < 2 or len(weights) != n_layers or len(kinds) > 1:
        raise SchemeError(
            f"Layers that share are as many as the {ready.among} of their scheme, at least two, "
            f"and of one shape and dtype, but got {len(weights)} layers of {len(kinds)} kinds for "
            f"{ready.scheme}."
        )


def _shared(problems: Sequence[LayerProblem], ready: Plan, dtype: torch.dtype) -> list[Found]:
    """What the stages before a residual make of each layer."""
    if ready.share is not None:
        return _tied(problems, ready.share, ready, dtype)
    if ready.factorize is not None:
        return _shared_factors(problems, ready, dtype)
    return _shared_codes(problems, ready, dtype)


def _shared_codes(problems: Sequence[LayerProblem], ready: Plan, dtype: torch.dtype) -> list[Found]:
    """Codes of each, whose meaning all of them share."""
    assert ready.quantize is not None  # else nothing is shared
    method = ready.quantize.method
    assert isinstance(method, SharedQuantizer)
    o, d = problems[0].weight.shape
    storage = ready.storage((o, d))
    found = method.quantize_together(problems, ready.quantize.options)
    return [(storage.encode(one, None, dtype), one.notes) for one in found]


def _tied(
    problems: Sequence[LayerProblem], step: Step[Tie[Any]], ready: Plan, dtype: torch.dtype
) -> list[Found]:
    """One matrix, compressed with the inputs of all the layers."""
    target, notes = step.method.target(problems, step.options)
    problem = LayerProblem(target, step.method.statistics(problems))
    tensors, more = compress_main(problem, ready, target, dtype)
    return [(tensors, (*notes, *more)) for _ in problems]


def _shared_factors(
    problems: Sequence[LayerProblem], ready: Plan, dtype: torch.dtype
) -> list[Found]:
    """One B of all the layers, compressed with the inputs of all; A of each, fitted to it."""
    assert ready.factorize is not None  # callers have checked
    step, together = ready.factorize, pooled(problems, ready.numbers)
    outer, inner, notes = step.method.factorize(together, step.options)
    problem_b = LayerProblem(inner, together.statistics)
    shared, notes_b = compress_matrix(problem_b, ready, inner, dtype)
    notes += tuple(f"factor b: {note}" for note in notes_b)
    decoded = ready.storage((inner.shape[0], inner.shape[1])).decode(shared).float()
    found: list[Found] = []
    for problem, rows in zip(problems, outer.chunk(len(problems)), strict=True):
        statistics = through(problem, decoded)
        own = refitted(problem, decoded, statistics, rows.contiguous())
        tensors, more = compress_matrix(LayerProblem(own, statistics), ready, own, dtype)
        stored = {f"a.{name}": tensor for name, tensor in tensors.items()}
        stored |= {f"b.{name}": tensor for name, tensor in shared.items()}
        found.append((stored, (*notes, *(f"factor a: {note}" for note in more))))
    return found


def _with_residuals(
    problems: Sequence[LayerProblem], ready: Plan, found: Sequence[Found], dtype: torch.dtype
) -> list[Found]:
    """Each layer's own correction beside what the shared stages make of it."""
    if ready.residual is None:
        return list(found)
    return [
        _corrected(problem, ready, ready.residual, one, dtype)
        for problem, one in zip(problems, found, strict=True)
    ]


def _corrected(
    problem: LayerProblem, ready: Plan, step: Step[Residual[Any]], found: Found, dtype: torch.dtype
) -> Found:
    tensors, notes = found
    matrix = decode_main(tensors, ready, (problem.weight.shape[0], problem.weight.shape[1]))
    part, _, more = step.method.fit(problem, step.options, lambda _: matrix.float(), dtype)
    return tensors | {f"{RESIDUAL}{name}": t for name, t in part.items()}, (*notes, *more)
