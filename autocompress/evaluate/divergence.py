"""Kullback-Leibler divergence to the base from its top-k log-probabilities.

The base keeps the log-probabilities of its k most likely tokens, normalised over the whole
vocabulary. Everything else is one bucket whose mass is what the kept part leaves. The divergence
between the two lumped distributions never exceeds the true one (data-processing inequality; Cover
and Thomas, Elements of Information Theory, 2nd ed., sec. 2.8) and equals it for k = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOP_K = 512


@dataclass(frozen=True, slots=True)
class BaseRows:
    """What is kept of the base's distribution at ``n`` positions.

    Attributes:
        nll: negative log-likelihood of the target in nats, shape ``(n,)``, float32.
        ids: the k most likely tokens, most likely first, shape ``(n, k)``, int32.
        logprobs: their log-probabilities, shape ``(n, k)``, float32.
    """

    nll: Tensor
    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True, slots=True)
class RowScores:
    """A model against the base at ``n`` positions; each of shape ``(n,)``.

    Attributes:
        nll: negative log-likelihood of the target in nats.
        kl: KL(base || model) in nats.
        agrees: 1 where the base's most likely token is (one of) the model's most likely.
    """

    nll: Tensor
    kl: Tensor
    agrees: Tensor


def keep_base(logits: Tensor, targets: Tensor, k: int = TOP_K) -> BaseRows:
    """What `score` needs of the base's logits.

    Args:
        logits: shape ``(n, vocabulary)``, float32; overwritten.
        targets: shape ``(n,)``, int64.
        k: entries to keep; at most the vocabulary is kept.
    """
    at_target = logits.gather(1, targets[:, None])[:, 0]
    values, ids = logits.topk(min(k, logits.shape[1]), dim=1)
    normaliser = _logsumexp_(logits, values[:, 0])
    return BaseRows(normaliser - at_target, ids.int(), values - normaliser[:, None])


def score(logits: Tensor, targets: Tensor, base: BaseRows) -> RowScores:
    """A model's logits against what was kept of the base at the same positions.

    Args:
        logits: shape ``(n, vocabulary)``, float32; overwritten.
        targets: shape ``(n,)``, int64.
        base: rows of the same positions, on the same device.

    Returns:
        Scores; NaN where the logits are not finite, and infinite divergence where the model rules
        out what the base allows.
    """
    at_target = logits.gather(1, targets[:, None])[:, 0]
    at_kept = logits.gather(1, base.ids.long())
    largest = logits.amax(1)
    agrees = (at_kept[:, 0] >= largest).float()
    complete = base.ids.shape[1] == logits.shape[1]
    normaliser = _logsumexp_(logits, largest)
    kept = at_kept - normaliser[:, None]
    return RowScores(
        normaliser - at_target, lumped_kl(base.logprobs, kept, complete=complete), agrees
    )


def lumped_kl(base: Tensor, model: Tensor, *, complete: bool) -> Tensor:
    """KL(base || model) in nats of distributions known on the base's kept entries only.

    Args:
        base: log-probabilities of the base at its kept entries, shape ``(n, k)``.
        model: log-probabilities of the model at the same entries, shape ``(n, k)``.
        complete: the kept entries are the whole vocabulary, so nothing is left to lump.

    Returns:
        Shape ``(n,)``, never negative; NaN where `model` is NaN.
    """
    p = base.exp()
    # 0 log 0 = 0: an entry that the base rules out adds nothing
    terms = torch.where(p > 0, p * (base - model), 0.0)
    kl = terms.sum(1, dtype=torch.float64)
    if not complete:
        kl = kl + _rest(p, model)
    return kl.clamp(min=0.0).float()


def _rest(p: Tensor, model: Tensor) -> Tensor:
    """The divergence of the bucket that holds all entries that were not kept, shape ``(n,)``."""
    p_rest = (1.0 - p.sum(1, dtype=torch.float64)).clamp(min=0.0)
    # below the rounding error of float32 log-probabilities a mass is not known to differ from 0
    q_rest = (1.0 - model.exp().sum(1, dtype=torch.float64)).clamp(
        min=torch.finfo(torch.float32).eps
    )
    return torch.xlogy(p_rest, p_rest / q_rest)


def _logsumexp_(logits: Tensor, largest: Tensor) -> Tensor:
    """``logsumexp`` of each row, shape ``(n,)``, in place to spare a copy of the vocabulary."""
    return logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)
