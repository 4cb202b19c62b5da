"""A stored layer whose scales and codes can still move, by the gradient of whatever loss.

Gradient descent on the step sizes of a quantized weight (LSQ, Esser et al. 2020, arXiv 1902.08153)
in units of the scales that there were, and on the place of each weight between two levels, rounding
being the identity in gradients (AdaRound, Nagel et al. 2020, arXiv 2004.10568; SignRound, Cheng et
al. 2024, arXiv 2309.05516). Scales move by Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1),
roundings by the sign of their gradient alone: momentum flips too many at once. A weight starts
where it lies, or as near to there as rounds to its code, so what hardly decided first moves first.
The file keeps its layout: zero points and mask, transform and residual stay.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autocompress.core.scheme import Scheme
from autocompress.methods.compress import CompressedWeight
from autocompress.methods.grid import NEARLY_HALF, GridCoding, least_offsets, storable
from autocompress.methods.levels import grouped, per_weight
from autocompress.methods.problem import LayerProblem, LayerStatistics
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
        weight: what was compressed, (o, d): how far each code is from its neighbours.
    """

    def __init__(self, packed: CompressedWeight, weight: Tensor) -> None:
        ready = plan(packed.scheme)
        assert isinstance(ready.coding, GridCoding)  # by contract
        self._packed, self._ready = packed, ready
        self._grid = ready.coding.grid(packed.tensors)
        self._d, self._width = packed.shape[1], self._grid.options.width(packed.shape[1])
        self._top = self._grid.options.n_levels - 1
        self._start = self._grid.scales.float()
        self._zeros = self._wide(self._grid.float_zeros.expand(self._start.shape))
        self._residual = _residual(packed, ready)
        codes, self._mask = ready.storage(packed.shape).codes(packed.tensors)
        self._places = self._unrounded(codes, weight)
        self._change, self._offsets = torch.zeros_like(self._start), torch.zeros_like(self._places)
        self._of_scales = _Adam(self._change)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The (o, d) matrix with the current codes and scales, as `decode` gives it."""
        return self._placed(self._levels() * self._wide(self._scales())).to(dtype)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self._grid.options.bits

    def descend(self, gradient: Tensor, scale_step: float, rounding_step: float) -> None:
        """Move every scale and every rounding downhill.

        Args:
            gradient: of the loss with respect to `dense`, (o, d), or any positive multiple that
                does not change from call to call.
            scale_step: how far, as a share of the scale, about.
            rounding_step: how far, in steps of the grid.
        """
        of_values = self._pulled_back(gradient.float())
        of_groups = grouped(of_values * self._levels(), self._width).sum(-1)
        self._change -= scale_step * self._of_scales.direction(of_groups * self._start)
        self._change.clamp_(-_LARGEST_CHANGE, _LARGEST_CHANGE)
        of_codes = of_values * self._wide(self._start)
        self._offsets -= rounding_step * of_codes.sign()
        self._offsets.clamp_(-NEARLY_HALF, NEARLY_HALF)

    def packed(self) -> CompressedWeight:
        """The layer as it is now: other codes and scales, in the same layout."""
        grid = replace(self._grid, scales=self._scales().half())
        storage = self._ready.storage(self._packed.shape)
        moved = storage.encode(grid.quantized(self._codes()), self._mask, torch.float32)
        return replace(self._packed, tensors={**self._packed.tensors, **moved})

    def _unrounded(self, codes: Tensor, weight: Tensor) -> Tensor:
        """Where each weight lies between the levels, (o, d); moved as little as gives its code."""
        values = self._in_basis(weight.float())
        if self._residual is not None:
            values = values - self._residual
        places = values / self._wide(self._start) + self._zeros
        return places + least_offsets(codes, places)

    def _codes(self) -> Tensor:
        """Rounded as they are now, (o, d) uint8."""
        return (self._places + self._offsets).round_().clamp_(0, self._top).to(torch.uint8)

    def _levels(self) -> Tensor:
        """What the scales are multiplied by, (o, d)."""
        levels = self._codes() - self._zeros
        return levels if self._mask is None else levels * self._mask

    def _scales(self) -> Tensor:
        """As stored, (o, G) float32."""
        return storable(self._start * (1 + self._change))

    def _wide(self, per_group: Tensor) -> Tensor:
        """(o, d) from (o, G)."""
        return per_weight(per_group, self._width, self._d)

    def _in_basis(self, weight: Tensor) -> Tensor:
        """The weight in the basis of the codes."""
        step = self._ready.transform
        if step is None:
            return weight
        problem = LayerProblem(weight, LayerStatistics.none())
        stored = under(TRANSFORM, self._packed.tensors)
        return step.method.apply(problem, stored, step.options).weight

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


class _Adam:
    """Running means of gradients; where they agree, a step is whole, where they do not, small."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)
        self._n_steps = 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Uphill, each entry between about -1 and 1."""
        self._n_steps += 1
        self._mean.lerp_(gradient, 1 - _MEAN)
        self._square.lerp_(gradient.square(), 1 - _SQUARE)
        mean = self._mean / (1 - _MEAN**self._n_steps)
        size = (self._square / (1 - _SQUARE**self._n_steps)).sqrt_()
        return mean / (size + _TINY)


def _residual(packed: CompressedWeight, ready: Plan) -> Tensor | None:
    step = ready.residual
    if step is None:
        return None
    return step.method.values(under(RESIDUAL, packed.tensors), packed.shape, step.options)
