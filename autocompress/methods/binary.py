"""Binary weights: the sign, with one size per group.

XNOR-Net (Rastegari et al. 2016, arXiv 1603.05279, section 3.1), with inputs weighted by their
energy h: ``a = sum_j h_j |w_j| / sum_j h_j`` minimises ``sum_j h_j (w_j - a sign(w_j))^2``. Zero is
not a value, so pruned weights cannot be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Quantized
from autocompress.methods.levels import GroupOptions, ListedLevels, ScaledCoding, by_group
from autocompress.methods.problem import LayerProblem

_LEVELS = ListedLevels((-1.0, 1.0))
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class BinaryCoding(ScaledCoding):
    """Signs with scales (o, G) float16."""

    maskable: ClassVar[bool] = False


class Binary(Quantizer[GroupOptions]):
    """Signs and sizes."""

    needs = Needs.DIAGONAL
    options = GroupOptions
    summary = "the sign of each weight, and a weighted mean size per group (1 bit)"

    def coding(self, options: GroupOptions) -> ScaledCoding:
        """See `Quantizer.coding`."""
        return BinaryCoding(_LEVELS, options.group_size)

    def quantize(
        self,
        problem: LayerProblem,
        mask: Tensor | None,  # noqa: ARG002 - there is none
        options: GroupOptions,
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        coding, weight = self.coding(options), problem.weight
        sizes = by_group(weight, problem.importance, coding.width(weight.shape[1]), _mean_size)
        return coding.quantized(weight, sizes.clamp(max=_FP16_MAX))


def _mean_size(block: Tensor, cost: Tensor) -> Tensor:
    return (block.abs() * cost).sum(-1) / cost.sum(-1)


METHODS.add("binary", Binary())
