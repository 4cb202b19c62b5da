"""Masked-token prediction: pseudo-perplexity and KL to the base."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autocompress.core import derived_seed
from autocompress.core.errors import ModelError
from autocompress.evaluate.batching import IGNORED, pad_ids, pad_labels, pad_token_of
from autocompress.evaluate.corpus import Corpus
from autocompress.evaluate.splits import Example, Split, tensor_digest
from autocompress.evaluate.task import TASKS, CorpusKind
from autocompress.evaluate.tasks.language import LanguageTask
from autocompress.evaluate.tokens import (
    affixes,
    as_tokenizer,
    longest_sequence,
    pad_token,
    windows,
)

MASKED_SHARE = 0.15


class MaskedLM(LanguageTask):
    """Windows of running text with 15 % of the tokens masked, at places drawn once."""

    name = "masked-lm"
    auto_class = "AutoModelForMaskedLM"
    corpus_kind = CorpusKind.TEXT
    default_data = "python-docs"
    summary = "masked-token prediction: pseudo-perplexity at fixed places and KL to the base model"

    def encode(
        self,
        corpus: Corpus,
        processor: object,
        *,
        sequence_length: int,
        seed: int,
        config: object = None,
    ) -> list[Example]:
        """Windows with their masked places; a place depends on the seed and the window's content.

        Each example holds ``input_ids`` with masks and ``labels``, the token where there is a mask
        and -100 elsewhere; both of shape ``(length,)``.
        """
        tokenizer = as_tokenizer(processor, self.name)
        mask = tokenizer.mask_token_id
        if mask is None:
            raise ModelError(
                "The task masked-lm needs a tokenizer with a mask token, but this one has none. "
                "Choose another --task."
            )
        length = longest_sequence(tokenizer, config, sequence_length)
        prefix, suffix = affixes(tokenizer)
        body = range(len(prefix), length - len(suffix))
        padding = torch.tensor(pad_token(tokenizer, config))
        return [
            {**_masked(window, body, mask, seed), "pad_token_id": padding}
            for window in windows(tokenizer, corpus, length)
        ]

    def tokens_per_pass(self, split: Split) -> int:
        """The mean length of a sequence."""
        return max(1, round(split.n_tokens / len(split)))

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {
            **pad_ids([e["input_ids"] for e in examples], pad_token_of(examples)),
            "labels": pad_labels([e["labels"] for e in examples]),
        }

    def _inputs(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def _targets(self, examples: Sequence[Example], batch: dict[str, Tensor]) -> Tensor:  # noqa: ARG002
        return batch["labels"]

    def _n_targets(self, example: Example) -> int:
        return int((example["labels"] != IGNORED).sum())

    def _n_logits(self, example: Example) -> int:
        return example["input_ids"].numel()


def _masked(window: Tensor, body: range, mask: int, seed: int) -> Example:
    draw = random.Random(derived_seed("mask", seed, tensor_digest(window)))
    places = torch.tensor(sorted(draw.sample(body, max(1, round(MASKED_SHARE * len(body))))))
    labels = torch.full_like(window, IGNORED)
    labels[places] = window[places]
    return {"input_ids": window.index_fill(0, places, mask), "labels": labels}


TASKS.add(MaskedLM.name, MaskedLM())
