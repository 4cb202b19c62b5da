"""Next-token prediction: perplexity and KL to the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autocompress.evaluate.batching import IGNORED, pad_ids, pad_token_of
from autocompress.evaluate.corpus import Corpus
from autocompress.evaluate.splits import Example, Split
from autocompress.evaluate.task import TASKS, CorpusKind
from autocompress.evaluate.tasks.language import LanguageTask
from autocompress.evaluate.tokens import as_tokenizer, longest_sequence, pad_token, windows


class CausalLM(LanguageTask):
    """Windows of running text, each token predicted from those before it."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    corpus_kind = CorpusKind.TEXT
    default_data = "python-docs"
    summary = "next-token prediction: perplexity and KL to the base model"

    def encode(
        self,
        corpus: Corpus,
        processor: object,
        *,
        sequence_length: int,
        seed: int,  # noqa: ARG002 - nothing is drawn
        config: object = None,
    ) -> list[Example]:
        """Windows of exactly `sequence_length` tokens, ``input_ids`` of shape ``(length,)``.

        Each starts with the tokenizer's own first token if it has one: many models are lost
        without it.
        """
        tokenizer = as_tokenizer(processor, self.name)
        length = longest_sequence(tokenizer, config, sequence_length)
        padding = torch.tensor(pad_token(tokenizer, config))
        return [
            {"input_ids": window, "pad_token_id": padding}
            for window in windows(tokenizer, corpus, length, with_suffix=False)
        ]

    def tokens_per_pass(self, split: Split) -> int:  # noqa: ARG002 - decoding goes one by one
        """Always 1: a decoder reads its weights again for each token."""
        return 1

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return pad_ids([e["input_ids"] for e in examples], pad_token_of(examples))

    def _inputs(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        return batch

    def _targets(self, examples: Sequence[Example], batch: dict[str, Tensor]) -> Tensor:  # noqa: ARG002
        following = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)[:, 1:]
        return torch.nn.functional.pad(following, (0, 1), value=IGNORED)

    def _n_targets(self, example: Example) -> int:
        return example["input_ids"].numel() - 1

    def _n_logits(self, example: Example) -> int:
        return example["input_ids"].numel()


TASKS.add(CausalLM.name, CausalLM())
