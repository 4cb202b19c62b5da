"""Target text from source text: perplexity of the target and KL to the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from autocompress.core.errors import DataError
from autocompress.evaluate.batching import mask_of, pad_ids, pad_labels, pad_token_of
from autocompress.evaluate.corpus import Corpus
from autocompress.evaluate.splits import Example, Split
from autocompress.evaluate.task import TASKS, CorpusKind
from autocompress.evaluate.tasks.language import LanguageTask
from autocompress.evaluate.tokens import (
    as_tokenizer,
    encode_texts,
    longest_sequence,
    pad_token,
    windows,
)


class Seq2SeqLM(LanguageTask):
    """Pairs of source and target; of plain text, a window and the window that follows it."""

    name = "seq2seq-lm"
    auto_class = "AutoModelForSeq2SeqLM"
    corpus_kind = CorpusKind.TEXT_PAIRS
    default_data = "python-docs"
    summary = "target text from source text: perplexity of the target and KL to the base model"

    def encode(
        self,
        corpus: Corpus,
        processor: object,
        *,
        sequence_length: int,
        seed: int,  # noqa: ARG002 - nothing is drawn
        config: object = None,
    ) -> list[Example]:
        """``input_ids`` of the source and ``labels``, the ids of the target.

        Pairs are cut to `sequence_length` tokens each; plain text gives source and target half of
        that each.
        """
        tokenizer = as_tokenizer(processor, self.name)
        length = longest_sequence(tokenizer, config, sequence_length)
        if corpus.pairs:
            sources = encode_texts(tokenizer, [a for a, _ in corpus.pairs], length)
            targets = encode_texts(tokenizer, [b for _, b in corpus.pairs], length)
        else:
            halves = windows(tokenizer, corpus, length // 2)
            following = list(pairwise(halves))[::2]
            if not following:
                raise DataError(
                    f"The data is too short: {corpus.source!r} holds no two sequences of "
                    f"{length // 2} tokens. Give more data or lower --sequence-length."
                )
            sources, targets = [a for a, _ in following], [b for _, b in following]
        padding = torch.tensor(pad_token(tokenizer, config))
        return [
            {
                "input_ids": source,
                "labels": target,
                "n_tokens": torch.tensor(source.numel() + target.numel()),
                "pad_token_id": padding,
            }
            for source, target in zip(sources, targets, strict=True)
        ]

    def tokens_per_pass(self, split: Split) -> int:  # noqa: ARG002 - decoding goes one by one
        """Always 1: a decoder reads its weights again for each token."""
        return 1

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """With ``labels``, from which the model makes its decoder's inputs."""
        labels = [e["labels"] for e in examples]
        return {
            **pad_ids([e["input_ids"] for e in examples], pad_token_of(examples)),
            "labels": pad_labels(labels),
            "decoder_attention_mask": mask_of(labels),
        }

    def _inputs(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The decoder's inputs in place of the labels, to spare the loss that nobody reads."""
        # every encoder-decoder of transformers has this method; nn.Module cannot know
        shift = cast(Callable[..., Tensor], module.prepare_decoder_input_ids_from_labels)
        shifted = shift(labels=batch["labels"])
        return {
            **{name: tensor for name, tensor in batch.items() if name != "labels"},
            "decoder_input_ids": shifted,
        }

    def _targets(self, examples: Sequence[Example], batch: dict[str, Tensor]) -> Tensor:  # noqa: ARG002
        return batch["labels"]

    def _n_targets(self, example: Example) -> int:
        return example["labels"].numel()

    def _n_logits(self, example: Example) -> int:
        return example["labels"].numel()


TASKS.add(Seq2SeqLM.name, Seq2SeqLM())
