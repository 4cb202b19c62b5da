"""The tokens of one sequence at one layer input, and what their gradients add up to."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_GRADIENTS = 1 << 21


class SequenceRows:
    """The tokens of one sequence at one input, rows x_t (n, d), and what their gradients add up to.

    An error D of a weight changes the outputs of all tokens of a sequence at once, so to second
    order it does ``1/2 sum_r (sum_t g_tr D_r x_t)^2``: with ``A_ts = g_t . g_s``, the sum over r of
    the matrices in it is ``X^T A X``. Not coupled, A keeps its diagonal only.

    Attributes:
        rows: X.
        gram: A, summed over the layers that read the input, (n, n).
    """

    def __init__(self, rows: Tensor, coupled: bool) -> None:
        self.rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.coupled = coupled
        n = len(rows)
        self.gram = self.rows.new_zeros(n, n) if coupled else self.rows.new_zeros(n).diag()

    def take(self, gradient: Tensor) -> Tensor:
        """Take the gradients (n, o) of a layer; gives its share of each output, (o,) float64.

        ``sum_ts g_tr (x_t . x_s) g_sr`` coupled, else ``sum_t g_tr^2``. A few outputs at a time:
        the gradient of the logits is large.
        """
        inner = self.rows @ self.rows.T if self.coupled else None
        found = []
        for part in torch.split(gradient, _CHUNK_GRADIENTS // max(1, len(gradient)) + 1, dim=1):
            g = part.to(self.rows.dtype)
            square = g * (g if inner is None else inner @ g)
            found.append(square.sum(0, dtype=torch.float64).clamp(min=0))
            self.gram += g @ g.T if self.coupled else g.square().sum(1).diag()
        return torch.cat(found)

    def weighted(self) -> tuple[float, Tensor]:
        """``X^T A X`` as a factor and a matrix (d, d).

        Squared gradients may be far from 1: the factor keeps products within float32.
        """
        largest = float(self.gram.diagonal().max()) if len(self.gram) else 0.0
        return largest, self.rows.T @ ((self.gram / (largest or 1.0)) @ self.rows)
