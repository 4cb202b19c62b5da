"""Drop: the layer's matrix is zero and takes no bytes.

Of the attention or the feed-forward part of a block it prunes that part, of both the block
(ShortGPT, Men et al. 2024, arXiv 2403.03853; SLEB, Song et al. 2024, arXiv 2402.09025; EvoPress,
Sieberling et al. 2024, arXiv 2410.14649): biases stay. Layers that are dropped multiply nothing.

Of an expert it prunes the expert (Lu et al. 2024, arXiv 2402.14800; REAP, Lasby et al. 2025, arXiv
2510.13999). Those rank experts and take the row of a dropped one out of the router; here the
predicted damage ranks them, and the router stays as it is, because each architecture's computes its
choice inside, and because a shorter one wins nothing where experts of all blocks compete
(`benchmarks/mixture.py`). A token that is sent to a dropped expert gets what its other experts put
out, each with the share that the router gave it: exactly what a matrix of zeros computes, in every
format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.core.footprint import TensorLayout
from autocompress.methods.base import METHODS, Needs, Quantizer
from autocompress.methods.coding import Coding, Quantized, Stored
from autocompress.methods.problem import LayerProblem


@dataclass(frozen=True, slots=True)
class DropOptions:
    """`drop` has no options."""


@dataclass(frozen=True)
class ZeroCoding(Coding):
    """Every entry is zero; nothing is stored."""

    maskable: ClassVar[bool] = False
    stores_codes: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        """See `Coding.bits`: none."""
        return 0

    def parameters(self, shape: tuple[int, int]) -> dict[str, TensorLayout]:  # noqa: ARG002
        """See `Coding.parameters`: none."""
        return {}

    def values(
        self,
        codes: Tensor,
        parameters: Stored,  # noqa: ARG002
        shape: tuple[int, int],
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `Coding.values`; the codes mean nothing."""
        n_rows = shape[0] if rows is None else len(rows)
        return torch.zeros(n_rows, shape[1], device=codes.device)


class Drop(Quantizer[DropOptions]):
    """A matrix of zeros."""

    needs = Needs.NONE
    options = DropOptions
    summary = "the layer's matrix is zero and takes no bytes: drops an expert, or a part of a block"

    def coding(self, options: DropOptions) -> ZeroCoding:  # noqa: ARG002
        """See `Quantizer.coding`."""
        return ZeroCoding()

    def quantize(
        self,
        problem: LayerProblem,
        mask: Tensor | None,  # noqa: ARG002 - there is none
        options: DropOptions,  # noqa: ARG002
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        return Quantized(problem.weight.new_empty(0, dtype=torch.uint8), {})


METHODS.add("drop", Drop())
