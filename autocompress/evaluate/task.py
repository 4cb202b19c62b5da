"""The contract of a task: what to read, how to ask the model, and how to score its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from autocompress.core import Quality, Registry
from autocompress.core.errors import UsageError

if TYPE_CHECKING:
    from autocompress.evaluate.corpus import Corpus
    from autocompress.evaluate.splits import Example, Split

Reference = Mapping[str, Tensor]
"""What `Task.score` needs of the base model's outputs on one split: named CPU tensors without
bfloat16, so that a worker can be handed them as numpy arrays without a copy."""

Scores = Mapping[str, Tensor]
"""What a model did on each sequence: named CPU tensors of shape ``(n, ...)`` in the split's order,
sums and counts in float64. Scores of consecutive pieces of a split are joined with `join`."""


def join(pieces: Sequence[Scores]) -> Scores:
    """The scores of consecutive pieces of a split as those of all their sequences."""
    if len(pieces) == 1:
        return pieces[0]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


class CorpusKind(StrEnum):
    """What a task reads from a corpus."""

    TEXT = "text"
    LABELLED_TEXT = "labelled text"
    LABELLED_IMAGES = "labelled images"
    TEXT_PAIRS = "source and target texts"
    PASSAGES = "passages"


class Task(ABC):
    """One way to ask a model and to score it. Stateless: all state is in its arguments.

    Attributes:
        name: as on the command line.
        auto_class: the transformers class that loads a model for this task.
        corpus_kind: what `load_corpus` must return.
        default_data: what is read if the user names no data; None if the user must.
        damage: name of the metric that `Quality.damage` is.
        summary: one line for people.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    corpus_kind: ClassVar[CorpusKind]
    default_data: ClassVar[str | None]
    damage: ClassVar[str]
    summary: ClassVar[str]

    @property
    def details(self) -> Mapping[str, str]:
        """What a measurement says besides the task's name: how the model's outputs are read."""
        return {}

    @property
    def facts(self) -> Sequence[str]:
        """What names of files that hold results of `curvature_loss` or `answers` depend on.

        Empty for the default of `details`, so that such files of earlier versions are still found.
        """
        return ()

    def with_pooling(self, pooling: str) -> Self:  # noqa: ARG002 - for tasks that pool
        """The task on a model whose embeddings are pooled so; see `evaluate.pooling`.

        Raises:
            ModelError: there is no such pooling.
        """
        return self

    @abstractmethod
    def encode(
        self,
        corpus: Corpus,
        processor: object,
        *,
        sequence_length: int,
        seed: int,
        config: object = None,
    ) -> list[Example]:
        """Turn a corpus into model inputs, one per sequence, not yet split.

        Args:
            corpus: of this task's `corpus_kind`.
            processor: tokenizer or image processor; None will do for images.
            sequence_length: longest sequence in tokens, special tokens included; lowered to what
                the tokenizer and the config allow.
            seed: of everything that is drawn; combined with the content, never with its order.
            config: the model's config; its label names, its image size and its longest sequence
                are used where it has them.

        Raises:
            DataError: the corpus does not hold what the task needs.
            ModelError: the processor does not do what the task needs.
        """

    @abstractmethod
    def batches(self, split: Split, batch_size: int) -> list[dict[str, Tensor]]:
        """Padded model inputs in a fixed order, longest sequences first.

        Padding is on the right; ``attention_mask`` (and ``decoder_attention_mask``) are 0 there.
        """

    @abstractmethod
    def reference(self, module: nn.Module, split: Split, *, batch_size: int) -> Reference:
        """The base model's outputs on a split, in the split's order whatever the batch size.

        Raises:
            ModelError: the outputs are not finite, or no better than chance.
        """

    @abstractmethod
    def rows(self, reference: Reference, split: Split, start: int, stop: int) -> Reference:
        """The part of a split's reference that belongs to its sequences start to stop - 1.

        Views wherever the layout allows it.
        """

    @abstractmethod
    def score(
        self, module: nn.Module, split: Split, reference: Reference, *, batch_size: int
    ) -> Scores:
        """Run a model on a split, each sequence against the base's outputs on it.

        The model is only read. Outputs that are not finite give scores that are not finite, never
        an exception. The scores of a sequence do not depend on the split or on `batch_size` but
        for rounding.
        """

    @abstractmethod
    def damages(self, scores: Scores) -> Tensor:
        """Damage of each sequence: (n,), float64, in nats or the like, summed over its tokens."""

    @abstractmethod
    def summarise(self, scores: Scores, split: Split, reference: Reference) -> Quality:
        """Estimate the quality from the scores of all sequences of a split; costs no forward."""

    def measure(
        self, module: nn.Module, split: Split, reference: Reference, *, batch_size: int
    ) -> Quality:
        """Score a model on a split and summarise; see `score` and `summarise`."""
        scores = self.score(module, split, reference, batch_size=batch_size)
        return self.summarise(scores, split, reference)

    @abstractmethod
    def tokens_per_pass(self, split: Split) -> int:
        """Tokens that share one reading of the weights when deployed.

        1 for decoding, which reads them again for each token, else the mean length of a sequence.
        """

    def curvature_batches(self, split: Split, batch_size: int) -> list[dict[str, Tensor]]:
        """As `batches`, with the data's labels where the task has any: for `curvature_loss`."""
        return self.batches(split, batch_size)

    def curvature_loss(
        self,
        module: nn.Module,  # noqa: ARG002 - nothing is differentiated here
        batch: dict[str, Tensor],  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
        *,
        empirical: bool = False,  # noqa: ARG002
    ) -> Tensor:
        """A scalar, summed over what is scored, whose gradients give the Fisher information.

        ``E[(g . delta)^2] / 2``, g its gradient, is the summed damage of a small change delta.

        Args:
            module: the model; whether its parameters take part is the caller's choice.
            batch: of `curvature_batches`.
            generator: on the CPU; draws labels from the model's own distribution.
            empirical: take the data's labels instead.

        Raises:
            UsageError: the task has no such loss, or no labels for the empirical one.
        """
        raise UsageError(
            f"The task {self.name} defines no curvature loss. Next step: override "
            "`Task.curvature_loss`, or search without a profile."
        )

    def answers(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:  # noqa: ARG002
        """What the model says about a batch, in the graph, as rows that `divergence` compares.

        By default log-probabilities of every scored position: (rows, classes), float32.

        Args:
            module: the model; whether its parameters take part is the caller's choice.
            batch: of `curvature_batches`.

        Raises:
            UsageError: the task has no differentiable answers.
        """
        raise UsageError(
            f"The task {self.name} defines no differentiable answers. Next step: override "
            "`Task.answers`, or take --sampler guided."
        )

    def divergence(self, answers: Tensor, base: Tensor) -> Tensor:
        """The damage summed over `n_scored` units: a scalar in the graph of `answers`.

        By default ``KL(base || model)`` in nats.

        Args:
            answers: of a compressed model.
            base: of the base model on the same batch, not in the graph.
        """
        p = base.exp()
        # 0 log 0 = 0: an entry that the base rules out adds nothing
        return torch.where(p > 0, p * (base - answers), 0.0).sum()

    def n_scored(self, batch: dict[str, Tensor]) -> int:
        """What a damage averages over, in one batch of `curvature_batches`: its sequences."""
        return len(next(iter(batch.values())))


TASKS: Registry[Task] = Registry("task", "autocompress.tasks")
