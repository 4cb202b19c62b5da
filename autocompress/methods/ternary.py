"""Ternary weights: ``-a``, zero or ``a``, with the best size per group.

Ternary weight networks (Li et al. 2016, arXiv 1605.04711), solved exactly instead of by
its threshold 0.7 mean|w|, and with inputs weighted by their energy h. For any a the best weights to
keep are those above a / 2, so some number of the largest. Keeping the set S lowers
``sum_j h_j (w_j - q_j)^2`` by ``(sum_S h_j |w_j|)^2 / sum_S h_j``, at a their weighted mean size:
one pass over the sorted sizes finds the best S.
"""

from __future__ import annotations

from torch import Tensor

from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Quantized
from autocompress.methods.levels import (
    GroupOptions,
    ListedLevels,
    ScaledCoding,
    by_group,
    kept_weight,
)
from autocompress.methods.problem import LayerProblem

_LEVELS = ListedLevels((-1.0, 0.0, 1.0))
_FP16_MAX = 65504.0


class Ternary(Quantizer[GroupOptions]):
    """Signs, sizes and zeros."""

    needs = Needs.DIAGONAL
    options = GroupOptions
    summary = "-a, 0 or a, with the best a per group (2 bits)"

    def coding(self, options: GroupOptions) -> ScaledCoding:
        """See `Quantizer.coding`."""
        return ScaledCoding(_LEVELS, options.group_size)

    def quantize(
        self, problem: LayerProblem, mask: Tensor | None, options: GroupOptions
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        coding, weight = self.coding(options), kept_weight(problem, mask)
        sizes = by_group(weight, problem.importance, coding.width(weight.shape[1]), _best_size)
        return coding.quantized(weight, sizes.clamp(max=_FP16_MAX))


def _best_size(block: Tensor, cost: Tensor) -> Tensor:
    sizes, order = block.abs().sort(stable=True, dim=-1, descending=True)
    costs = cost.expand_as(block).gather(-1, order)
    kept_cost = costs.cumsum(-1)
    kept_size = (sizes * costs).cumsum(-1)
    best = (kept_size.square() / kept_cost).argmax(-1, keepdim=True)
    means: Tensor = kept_size.gather(-1, best) / kept_cost.gather(-1, best)
    return means.squeeze(-1)


METHODS.add("ternary", Ternary())
