"""A stored layer whose scales can still move, by the gradient of whatever loss; codes stay.

Gradient descent on the step sizes of a quantized weight (LSQ, Esser et al. 2020, arXiv 1902.08153,
with integer weights frozen as in PEQA, Kim et al. 2023, arXiv 2305.14152) in units of the scales
that there were, by Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1). The file keeps its
layout: the same codes, zero points and mask, the same transform and residual.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autocompress.core.scheme import Scheme
from autocompress.methods.compress import CompressedWeight
from autocompress.methods.grid import GridCoding, storable
from autocompress.methods.levels import grouped, per_weight
from autocompress.methods.schemes import Plan, plan
from autocompress.methods.storage import RESIDUAL, TRANSFORM, under

_MEAN, _SQUARE = 0.9, 0.95  # how much of the running means stays at each step
_LARGEST_CHANGE = 0.25  # of a scale, relative
_TINY = 1e-30


def is_tunable(scheme: Scheme) -> bool:
    """True if layers under `scheme` are one matrix of codes on an integer grid."""
    ready = plan(scheme)
    whole = ready.rank is None and ready.width is None
    return whole and isinstance(ready.coding, GridCoding)


class Tunable:
    """The movable form of a packed layer.

    Args:
        packed: the layer, compressed by a scheme that `is_tunable`; where it starts.
    """

    def __init__(self, packed: CompressedWeight) -> None:
        ready = plan(packed.scheme)
        assert isinstance(ready.coding, GridCoding)  # by contract
        self._packed, self._ready = packed, ready
        grid = ready.coding.grid(packed.tensors)
        codes, mask = ready.storage(packed.shape).codes(packed.tensors)
        self._d, self._width = packed.shape[1], grid.options.width(packed.shape[1])
        self._levels = codes - self._wide(grid.float_zeros.expand(grid.scales.shape))
        if mask is not None:
            self._levels *= mask
        self._start = grid.scales.float()
        self._change = torch.zeros_like(self._start)
        self._mean, self._square = torch.zeros_like(self._start), torch.zeros_like(self._start)
        self._n_steps = 0
        self._residual = _residual(packed, ready)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The (o, d) matrix with the current scales, as `decode` gives it."""
        return self._placed(self._levels * self._wide(self._scales())).to(dtype)

    def descend(self, gradient: Tensor, step: float) -> None:
        """Move every scale by about the share `step` of itself, downhill.

        Args:
            gradient: of the loss with respect to `dense`, (o, d), or any positive multiple that
                does not change from call to call.
            step: how far.
        """
        of_values = self._pulled_back(gradient.float())
        slope = grouped(of_values * self._levels, self._width).sum(-1) * self._start
        self._n_steps += 1
        self._mean.lerp_(slope, 1 - _MEAN)
        self._square.lerp_(slope.square(), 1 - _SQUARE)
        mean = self._mean / (1 - _MEAN**self._n_steps)
        size = (self._square / (1 - _SQUARE**self._n_steps)).sqrt()
        self._change -= step * mean / (size + _TINY)
        self._change.clamp_(-_LARGEST_CHANGE, _LARGEST_CHANGE)

    def packed(self) -> CompressedWeight:
        """The layer as it is now: the same tensors but for the scales."""
        tensors = {**self._packed.tensors, "scales": self._scales().half()}
        return replace(self._packed, tensors=tensors)

    def _scales(self) -> Tensor:
        """As stored, (o, G) float32."""
        return storable(self._start * (1 + self._change))

    def _wide(self, per_group: Tensor) -> Tensor:
        """(o, d) from (o, G)."""
        return per_weight(per_group, self._width, self._d)

    def _placed(self, values: Tensor) -> Tensor:
        """The layer's matrix, of the values of its codes; linear but for the residual."""
        if self._residual is not None:
            values = values + self._residual
        step = self._ready.transform
        if step is None:
            return values
        return step.method.undo(values, under(TRANSFORM, self._packed.tensors), step.options)

    def _pulled_back(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the values of the codes."""
        if self._ready.transform is None:
            return gradient
        with torch.enable_grad():
            values = torch.zeros_like(gradient).requires_grad_()
            return torch.autograd.grad(self._placed(values), values, gradient)[0]


def _residual(packed: CompressedWeight, ready: Plan) -> Tensor | None:
    step = ready.residual
    if step is None:
        return None
    return step.method.values(under(RESIDUAL, packed.tensors), packed.shape, step.options)
