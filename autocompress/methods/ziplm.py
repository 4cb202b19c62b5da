"""ZipLM: remove the neurons or heads whose loss the others make up for best.

Kurtic et al. 2023 (arXiv 2302.04089), equations 1 and 2; DarwinLM (Tang et al. 2025, arXiv
2502.07780) removes the same way. With ``G = (H + ridge I)^-1`` a unit with the columns M costs
``tr(W_M (G_MM)^-1 W_M^T)``; once it is gone, ``W -= W_M (G_MM)^-1 G_M,:`` makes up for it and
``G -= G_:,M (G_MM)^-1 G_M,:``. One sweep ranks all units, so that the units of every width are
nested. Of many units several go at a time.

What the sweep leaves in the columns S that stay is the least-squares reconstruction
``W H_:,S (H_SS)^-1``, which is what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.methods.base import METHODS, Needs
from autocompress.methods.problem import DAMPING, LayerProblem
from autocompress.methods.wanda_sp import output_shares
from autocompress.methods.width import Chosen, Width, WidthOptions, columns_of, keep_best

_AT_ONCE = 32  # one of so many units goes at a time


class ZipLM(Width):
    """Removes units one after the other, those that stay make up for each."""

    needs = Needs.HESSIAN
    summary = "remove neurons or heads; those that stay make up for them (structured OBS)"

    def choose(self, reader: LayerProblem, options: WidthOptions) -> Chosen:
        """See `Width.choose`.

        Where H is of no use: as `wanda_sp`, with a note.
        """
        if reader.unseen:
            kept = keep_best(output_shares(reader, options.of), options.keep)
            note = f"ziplm compared weight x input and changed no weight: {reader.unseen}"
            return Chosen(kept, None, (note,))
        order = reader.latest(
            ("ziplm", options.of),
            lambda: removal_order(reader.weight.double(), _damped(reader), options.of),
        )
        kept = torch.ones(options.of, dtype=torch.bool, device=order.device)
        kept[order[: options.of - options.keep]] = False
        return Chosen(kept, lambda: reconstructed(reader.weight, _damped(reader), kept))


def removal_order(weight: Tensor, hessian: Tensor, n_units: int) -> Tensor:
    """Units in the order in which they go, (n_units,) int64; the last one never would.

    Args:
        weight: (o, d) float64.
        hessian: (d, d) float64, positive definite.
        n_units: that the d columns are.
    """
    size = weight.shape[1] // n_units
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    left = torch.arange(n_units, device=weight.device)
    gone: list[Tensor] = []
    while len(left) > 1:
        costs = _costs(weight, inverse, size)
        n = max(1, len(left) // _AT_ONCE)
        worst = torch.argsort(costs, stable=True)[:n]
        gone.append(left[worst])
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[worst] = False
        weight, inverse = _removed(
            weight,
            inverse,
            columns_of(stays, len(left) * size),
            columns_of(~stays, len(left) * size),
        )
        left = left[stays]
    return torch.cat([*gone, left])


def _costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """``tr(W_M (G_MM)^-1 W_M^T)`` of each unit, (n,)."""
    n = weight.shape[1] // size
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    own = inverse.view(n, size, n, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight.view(-1, n, size).permute(1, 2, 0)  # (n, size, o)
    costs: Tensor = (torch.linalg.solve(own, parts) * parts).sum((1, 2))
    return costs


def _removed(weight: Tensor, inverse: Tensor, stays: Tensor, goes: Tensor) -> tuple[Tensor, Tensor]:
    """W and G of the columns that stay."""
    own = inverse[goes][:, goes]
    pushed = torch.linalg.solve(own, inverse[goes][:, stays])  # (G_MM)^-1 G_MS
    return (
        torch.addmm(weight[:, stays], weight[:, goes], pushed, alpha=-1),
        torch.addmm(inverse[stays][:, stays], inverse[stays][:, goes], pushed, alpha=-1),
    )


def reconstructed(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """``W H_:,S (H_SS)^-1``, (o, kept columns) float32.

    Args:
        weight: (o, d).
        hessian: (d, d) float64, positive definite.
        kept: (units,) bool.
    """
    left = columns_of(kept, weight.shape[1])
    lower = torch.linalg.cholesky(hessian[left][:, left])
    crossed = weight.double() @ hessian[:, left]
    return torch.cholesky_solve(crossed.T, lower).T.float().contiguous()


def _damped(reader: LayerProblem) -> Tensor:
    """H + ridge I, (d, d) float64."""
    assert reader.hessian is not None  # the caller has checked
    hessian = reader.hessian.double()
    ridge = DAMPING * float(hessian.diagonal().mean()) or 1.0
    return hessian + ridge * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


METHODS.add("ziplm", ZipLM())
