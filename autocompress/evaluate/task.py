"""The contract of a task: what to read, how to ask the model, and how to score its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from autocompress.core import Quality, Registry

if TYPE_CHECKING:
    from autocompress.evaluate.corpus import Corpus
    from autocompress.evaluate.splits import Example, Split

Reference = Mapping[str, Tensor]
"""What `Task.measure` needs of the base model's outputs on one split: named CPU tensors without
bfloat16, so that a worker can be handed them as numpy arrays without a copy."""


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
    def measure(
        self, module: nn.Module, split: Split, reference: Reference, *, batch_size: int
    ) -> Quality:
        """Score a model on a split against the base's outputs on the same split.

        The model is only read. Outputs that are not finite give a quality that is not finite,
        never an exception. The result does not depend on `batch_size` but for rounding.
        """

    @abstractmethod
    def tokens_per_pass(self, split: Split) -> int:
        """Tokens that share one reading of the weights when deployed.

        1 for decoding, which reads them again for each token, else the mean length of a sequence.
        """


TASKS: Registry[Task] = Registry("task", "autocompress.tasks")
