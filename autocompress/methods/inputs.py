"""What a layer reads under a scheme that rounds its inputs.

The rounding takes place in the basis of the scheme's transform and leaves alone what only the
residual reads. Both are linear, so the layer is still one matrix, applied to mapped inputs:
``y = C T q(T^-1 x)`` with C the decoded matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from autocompress.core.scheme import Scheme
from autocompress.methods.problem import LayerProblem, LayerStatistics
from autocompress.methods.schemes import Plan, plan
from autocompress.methods.storage import RESIDUAL, TRANSFORM, WIDTH, under

InputMap = Callable[[Tensor], Tensor]
"""Inputs (..., d) to what the layer computes with, in the same dtype."""


def input_map(tensors: Mapping[str, Tensor], scheme: Scheme) -> InputMap | None:
    """How `scheme` rounds a layer's inputs; None if it leaves them alone.

    Args:
        tensors: the stored tensors of the layer.
        scheme: that they were made by.
    """
    ready = plan(scheme)
    if ready.inputs is None:
        return None
    if ready.width is not None:
        return _narrow_map(tensors, ready)
    rounding, transform, residual = ready.inputs, ready.transform, ready.residual
    moved, part = under(TRANSFORM, tensors), under(RESIDUAL, tensors)
    exact = None if residual is None else residual.method.exact_inputs(part, residual.options)

    def mapped(inputs: Tensor) -> Tensor:
        rows = inputs.float().reshape(-1, inputs.shape[-1])
        if transform is not None:
            rows = transform.method.inputs(rows, moved, transform.options)
        if exact is None:
            found = rounding.method.quantized(rows, rounding.options)
        else:
            kept = exact.to(rows.device)
            found = rounding.method.quantized(rows.index_fill(1, kept, 0.0), rounding.options)
            found = found.index_copy(1, kept, rows[:, kept])
        if transform is not None:
            found = transform.method.inputs_back(found, moved, transform.options)
        return found.view(inputs.shape).to(inputs.dtype)

    return mapped


def _narrow_map(tensors: Mapping[str, Tensor], ready: Plan) -> InputMap | None:
    """The inputs that are left are rounded without regard to those that are gone."""
    inside = input_map(tensors, ready.inside.scheme)
    assert ready.width is not None  # the caller has checked
    step = ready.width
    if inside is None or step.options.cuts_outputs:
        return inside

    def mapped(inputs: Tensor) -> Tensor:
        left = step.method.left(under(WIDTH, tensors), inputs.shape[-1], step.options)
        left = left.to(inputs.device)
        return inputs.index_copy(inputs.ndim - 1, left, inside(inputs[..., left]))

    return mapped


def input_errors(
    dense: Tensor, hessian: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme
) -> Tensor | None:
    """Expected squared error of each output per token, (o,), because inputs are rounded.

    Errors of different inputs are taken to be independent. None if `scheme` rounds no inputs.

    Args:
        dense: (o, d) float32: the decoded matrix.
        hessian: second moment of the inputs, (d, d).
        tensors: the stored tensors of the layer.
        scheme: that they were made by.
    """
    ready = plan(scheme)
    if ready.inputs is None:
        return None
    if ready.width is not None and not ready.width.options.cuts_outputs:
        step = ready.width
        left = step.method.left(under(WIDTH, tensors), dense.shape[1], step.options)
        left = left.to(dense.device)
        part = hessian[left][:, left]
        return input_errors(dense[:, left], part, tensors, ready.inside.scheme)
    rounding, transform, residual = ready.inputs, ready.transform, ready.residual
    if transform is not None:
        moved, options = under(TRANSFORM, tensors), transform.options
        problem = LayerProblem(dense, LayerStatistics(hessian, 1, "inputs"))
        problem = transform.method.apply(problem, moved, options)
        dense = problem.weight
        hessian = hessian if problem.hessian is None else problem.hessian
    errors = rounding.method.error(hessian, rounding.options)
    if residual is not None:
        exact = residual.method.exact_inputs(under(RESIDUAL, tensors), residual.options)
        errors = errors if exact is None else errors.index_fill(0, exact, 0.0)
    return dense.square() @ errors.to(dense)
