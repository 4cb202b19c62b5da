"""The scalar whose gradients say how much a small error of a layer's output damages the model.

For a distribution q over answers, labels drawn from q itself and ``L`` their summed cross entropy,
``E[(dL . delta)^2] / 2`` is the divergence that a small change delta causes, to second order: the
Fisher information (Amari 1998, Natural gradient works efficiently in learning, section 2; Kunstner
et al. 2019, arXiv 1905.12558, on why labels of the data give something else). For an embedding e of
unit length and ``v ~ N(0, I)``, ``L = v . e`` does the same for ``1 - cosine = |delta e|^2 / 2``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from autocompress.evaluate.batching import IGNORED, vocabulary_size

if TYPE_CHECKING:
    from autocompress.evaluate.splits import Split
    from autocompress.evaluate.task import Task

_BATCH_LOGITS = 1 << 26
"""Logits of one batch: 256 MiB in float32, of which about three copies live at a time."""
_CHUNK_LOGITS = 1 << 20
_BATCH_SIZE = 8


@dataclass(frozen=True, slots=True)
class TaskLoss:
    """A task's curvature loss together with what it is averaged over.

    Attributes:
        task: what is scored.
        empirical: take the data's labels instead of sampled ones.
    """

    task: Task
    empirical: bool = False

    def __call__(
        self, module: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """The summed loss of a batch and the number of units that it sums over."""
        inputs = dict(batch)
        loss = self.task.curvature_loss(module, inputs, generator, empirical=self.empirical)
        return loss, self.task.n_scored(inputs)


def curvature_batches(task: Task, module: nn.Module, split: Split) -> list[dict[str, Tensor]]:
    """Batches for a backward pass, small enough for the logits of a large vocabulary.

    A vocabulary of 262,144 entries goes one sequence at a time.
    """
    longest = max(_length(batch) for batch in task.batches(split, len(split)))
    fitting = max(1, _BATCH_LOGITS // (longest * vocabulary_size(module)))
    pads = getattr(getattr(module, "config", None), "pad_token_id", None) is not None
    size = min(_BATCH_SIZE, fitting) if pads or "input_ids" not in split.examples[0] else 1
    return task.curvature_batches(split, size)


def summed_cross_entropy(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy summed over the scored rows, with labels drawn from the rows themselves.

    Its gradient is made in the forward pass, so that backward holds one copy of the logits beside
    them, not three.

    Args:
        logits: (..., classes), in the graph.
        targets: (...), a label, or `SAMPLE` where one is to be drawn, or `IGNORED`.
        generator: on the CPU, of the labels.

    Returns:
        A scalar in nats.
    """
    with torch.no_grad():
        value, gradient = _loss_and_gradient(
            logits.reshape(-1, logits.shape[-1]), targets.flatten(), generator
        )
    apply = cast(Callable[..., Tensor], _Known.apply)
    return apply(logits, value, gradient.view_as(logits))


SAMPLE = -1
"""Target of a row whose label is drawn."""


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``-sum log q[y]`` and ``q - onehot(y)``, a bounded number of rows at a time."""
    gradient = torch.zeros_like(logits)
    value = torch.zeros((), dtype=torch.float64)
    scored = (targets != IGNORED).nonzero()[:, 0].to(logits.device)
    targets = targets.to(logits.device)
    for rows in torch.split(scored, max(1, _CHUNK_LOGITS // logits.shape[1])):
        wide = torch.promote_types(logits.dtype, torch.float32)
        logprobs = logits[rows].to(wide).log_softmax(1)
        probabilities = logprobs.exp()
        labels = targets[rows]
        labels = torch.where(labels == SAMPLE, _drawn(probabilities, generator), labels)
        value -= logprobs.gather(1, labels[:, None]).sum(dtype=torch.float64).cpu()
        probabilities[torch.arange(len(rows), device=rows.device), labels] -= 1
        gradient[rows] = probabilities.to(gradient.dtype)
    return value, gradient


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row by inversion of the cumulative sum: one random number per row, (n,)."""
    cumulative = probabilities.cumsum(1, dtype=torch.float64)
    uniform = torch.rand(len(cumulative), 1, dtype=torch.float64, generator=generator)
    wanted = uniform.to(cumulative.device) * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    return labels.clamp(max=cumulative.shape[1] - 1)


class _Known(torch.autograd.Function):
    """A scalar of which the gradient is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.to(logits.device)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None


def _length(batch: Mapping[str, Tensor]) -> int:
    """Positions of a batch that may get logits."""
    names = ("input_ids", "labels")
    return max((batch[n].shape[1] for n in names if n in batch and batch[n].ndim == 2), default=1)
