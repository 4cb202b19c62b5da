"""How one embedding is made of the hidden states of a text's tokens.

Names are those of sentence-transformers; several joined by ``+`` stand for their embeddings end to
end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autocompress.core.errors import ModelError, nearest

MEAN = "mean"
_TOGETHER = "+"


def require_pooling(pooling: str) -> None:
    """Refuse a pooling that is not built here.

    Raises:
        ModelError: names it, what there is, and the next step.
    """
    for name in pooling.split(_TOGETHER):
        if name not in _POOLINGS:
            raise ModelError(
                f"Embeddings are pooled by {', '.join(_POOLINGS)} (or several of them, joined by "
                f"{_TOGETHER}), but the model's pipeline says {name!r}. "
                f"{nearest(name, _POOLINGS)} Next step: choose another --task that the model's "
                "head fits, or another model; by another pooling it would be judged by embeddings "
                "that nobody computes."
            )


def pool(hidden: Tensor, mask: Tensor, pooling: str = MEAN) -> Tensor:
    """Embeddings of unit length, padding excluded, on whichever side it is.

    Args:
        hidden: shape ``(batch, length, width)``, float32.
        mask: shape ``(batch, length)``, 1 at tokens.
        pooling: see `require_pooling`.

    Returns:
        Shape ``(batch, width)``; of several poolings, ``width`` for each.
    """
    pooled = [_POOLINGS[name](hidden, mask) for name in pooling.split(_TOGETHER)]
    whole = pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)
    return torch.nn.functional.normalize(whole, dim=1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Reimers and Gurevych 2019, Sentence-BERT, section 3."""
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _mean_by_root(hidden: Tensor, mask: Tensor) -> Tensor:
    """The sum over the root of the length; by itself it points where the mean does."""
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).sqrt()


def _mean_by_place(hidden: Tensor, mask: Tensor) -> Tensor:
    """Tokens count by their place in the text, from 1; Muennighoff 2022, SGPT, section 3.2."""
    weights = (mask.cumsum(1) * mask)[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask.int().argmax(1))


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask.shape[1] - 1 - mask.flip(1).int().argmax(1))


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), places.to(hidden.device)]


def _largest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1)


_POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    MEAN: _mean,
    "cls": _first,
    "lasttoken": _last,
    "max": _largest,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _mean_by_place,
}
