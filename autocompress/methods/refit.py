"""The best values of the weights that are kept.

With the support S of a row w given, ``v_S = (w H)_S H_SS^-1`` minimises ``(v - w) H (v - w)^T``
over all v that are zero outside S (the least-squares reconstruction of Optimal Brain Surgeon,
Hassibi and Stork 1993; for whole layers e.g. Frantar and Alistarh 2023, arXiv 2301.00774, section
3.1). Each row has a system of its own; conjugate gradients solve them all at once by products with
H, so that none is factorised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.methods.problem import DAMPING, LayerProblem

_ROWS_AT_ONCE = 1 << 21  # elements of each of the buffers of a chunk of rows
_STEPS = 200
_NEGLIGIBLE = 1e-4  # share of the loss that a step must win, or it is the last


def refitted(problem: LayerProblem, mask: Tensor) -> Tensor:
    """The kept weights (o, d) float32 that lose least, zero where `mask` is False.

    H is damped, and the ridge pulls towards the weights themselves.

    Args:
        problem: the dense weight and its statistics; H must not be None.
        mask: (o, d) bool, True where the weight is kept.
    """
    assert problem.hessian is not None  # by contract
    hessian = problem.hessian.clone()
    diagonal = hessian.diagonal()
    diagonal.add_(DAMPING * float(diagonal.mean()) or 1.0)
    rows = max(1, _ROWS_AT_ONCE // len(hessian))
    parts = zip(torch.split(problem.weight, rows), torch.split(mask, rows), strict=True)
    return torch.cat([least_squares(weight, kept, hessian) for weight, kept in parts])


def least_squares(
    weight: Tensor, mask: Tensor, hessian: Tensor, negligible: float = _NEGLIGIBLE
) -> Tensor:
    """The matrix v, zero outside the mask, of least ``tr((v - w) H (v - w)^T)``.

    Preconditioned by diag(H). It ends when a step wins less than the share `negligible` of the
    loss that is left.

    Args:
        weight: (rows, d).
        mask: (rows, d) bool.
        hessian: (d, d), positive definite.
        negligible: see above.
    """
    kept = mask.to(weight.dtype)
    values = weight * kept
    scaling = kept / hessian.diagonal()
    error = (weight - values) @ hessian  # minus half the gradient, where weights are kept
    loss = float(((weight - values) * error).sum())
    residual = error.mul_(kept)
    direction = residual * scaling
    power = (residual * direction).sum(1, keepdim=True)
    for _ in range(_STEPS):
        pushed = (direction @ hessian).mul_(kept)
        step = _ratio(power, (direction * pushed).sum(1, keepdim=True))
        values.addcmul_(direction, step)
        residual.addcmul_(pushed, step, value=-1)
        won = float((step * power).sum())
        loss -= won
        if won <= negligible * loss:
            break
        scaled = residual * scaling
        last, power = power, (residual * scaled).sum(1, keepdim=True)
        direction = direction.mul_(_ratio(power, last)).add_(scaled)
    return values


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Their ratio; 0 in rows that are done."""
    return torch.where(below > 0, above / below, 0.0)
