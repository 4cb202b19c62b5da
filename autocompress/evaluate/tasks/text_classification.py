"""Text classification: accuracy and KL of the class probabilities to the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.evaluate.batching import pad_ids, pad_token_of
from autocompress.evaluate.corpus import Corpus, label_ids
from autocompress.evaluate.splits import Example
from autocompress.evaluate.task import TASKS, CorpusKind
from autocompress.evaluate.tasks.classification import ClassificationTask
from autocompress.evaluate.tokens import as_tokenizer, encode_texts, longest_sequence, pad_token


class TextClassification(ClassificationTask):
    """One label per text."""

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    corpus_kind = CorpusKind.LABELLED_TEXT
    default_data = None
    summary = "one label per text: accuracy and KL of the class probabilities to the base model"

    def encode(
        self,
        corpus: Corpus,
        processor: object,
        *,
        sequence_length: int,
        seed: int,  # noqa: ARG002 - nothing is drawn
        config: object = None,
    ) -> list[Example]:
        """``input_ids`` (length,), cut to `sequence_length`, and ``labels`` (a scalar)."""
        tokenizer = as_tokenizer(processor, self.name)
        length = longest_sequence(tokenizer, config, sequence_length)
        labels = label_ids(corpus, config)
        padding = torch.tensor(pad_token(tokenizer, config))
        return [
            {"input_ids": ids, "labels": torch.tensor(label), "pad_token_id": padding}
            for ids, label in zip(
                encode_texts(tokenizer, corpus.texts, length), labels, strict=True
            )
        ]

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return pad_ids([e["input_ids"] for e in examples], pad_token_of(examples))


TASKS.add(TextClassification.name, TextClassification())
