"""Sentence embeddings: fidelity to the base's, and retrieval where there are pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from autocompress.core import Measurement, Quality
from autocompress.core.errors import DataError, ModelError, UsageError
from autocompress.evaluate.batching import batch_indices, pad_ids, pad_token_of, place
from autocompress.evaluate.corpus import Corpus
from autocompress.evaluate.estimators import affine, mean
from autocompress.evaluate.pooling import MEAN, pool, require_pooling
from autocompress.evaluate.splits import Example, Split
from autocompress.evaluate.task import TASKS, CorpusKind, Reference, Scores, Task
from autocompress.evaluate.tokens import as_tokenizer, encode_texts, longest_sequence, pad_token

_TEXTS = ("input_ids", "positive_input_ids")
_HIGHEST_CHANCE = 0.999


@dataclass(frozen=True, slots=True)
class FeatureExtraction(Task):
    """Pooled, normalised embeddings, as sentence-transformers makes them.

    Cosines do not depend on lengths, so it is no matter whether the model's pipeline normalises.

    Attributes:
        pooling: of the hidden states; see `evaluate.pooling`.
    """

    pooling: str = MEAN

    name = "feature-extraction"
    auto_class = "AutoModel"
    corpus_kind = CorpusKind.PASSAGES
    default_data = "python-docs"
    damage = "infidelity"
    summary = "sentence embeddings: cosine to the base model's, retrieval accuracy on pairs"

    @property
    def details(self) -> Mapping[str, str]:
        """See `Task.details`."""
        return {"pooling": self.pooling}

    @property
    def facts(self) -> Sequence[str]:
        """See `Task.facts`."""
        return () if self.pooling == MEAN else ("pooling", self.pooling)

    def with_pooling(self, pooling: str) -> Self:
        """See `Task.with_pooling`."""
        require_pooling(pooling)
        return replace(self, pooling=pooling)

    def encode(
        self,
        corpus: Corpus,
        processor: object,
        *,
        sequence_length: int,
        seed: int,  # noqa: ARG002 - nothing is drawn
        config: object = None,
    ) -> list[Example]:
        """``input_ids`` (length,) of a text; of pairs, of the query, and ``positive_input_ids``."""
        tokenizer = as_tokenizer(processor, self.name)
        length = longest_sequence(tokenizer, config, sequence_length)
        padding = torch.tensor(pad_token(tokenizer, config))
        columns = [corpus.texts] if corpus.texts else list(zip(*corpus.pairs, strict=True))
        if not columns:
            raise DataError(
                f"The task {self.name} reads text, but {corpus.source!r} holds images. Name text."
            )
        encoded = [encode_texts(tokenizer, column, length) for column in columns]
        return [
            {**dict(zip(_TEXTS, texts, strict=False)), "pad_token_id": padding}
            for texts in zip(*encoded, strict=True)
        ]

    def tokens_per_pass(self, split: Split) -> int:
        """The mean length of a text."""
        return max(1, round(split.n_tokens / len(_texts(split))))

    def batches(self, split: Split, batch_size: int) -> list[dict[str, Tensor]]:
        """See `Task.batches`; queries and passages are texts alike."""
        texts, padding = _texts(split), pad_token_of(split.examples)
        groups = batch_indices([t.numel() for t in texts], batch_size)
        return [pad_ids([texts[i] for i in group], padding) for group in groups]

    def curvature_loss(
        self,
        module: nn.Module,
        batch: dict[str, Tensor],
        generator: torch.Generator,
        *,
        empirical: bool = False,
    ) -> Tensor:
        """``sum v . e`` with ``v ~ N(0, I)`` per text; see `Task.curvature_loss`."""
        if empirical:
            raise UsageError(
                f"The empirical Fisher information needs labels, but the task {self.name} has "
                "none. Next step: leave out --empirical."
            )
        embeddings = self.answers(module, batch)
        drawn = torch.randn(embeddings.shape, dtype=torch.float64, generator=generator)
        return (embeddings * drawn.to(embeddings)).sum()

    def answers(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """See `Task.answers`; the embeddings (texts, width) of unit length."""
        batch = place(batch, module)
        return pool(module(**batch).last_hidden_state, batch["attention_mask"], self.pooling)

    def divergence(self, answers: Tensor, base: Tensor) -> Tensor:
        """See `Task.divergence`; infidelity, by ``1 - cos = |difference|^2 / 2``."""
        return (answers.float() - base.float()).square().sum() / 2

    def reference(self, module: nn.Module, split: Split, *, batch_size: int) -> Reference:
        """``embeddings`` (texts, width), float32: of all first texts, then of all positives."""
        embeddings = self._embed(module, split, batch_size)
        if not bool(embeddings.isfinite().all()):
            raise ModelError(
                f"The base model must answer with finite numbers, but its embeddings of the "
                f"{split.name} texts hold NaN or infinity. Load it in another dtype (--dtype "
                "float32) or check its weights."
            )
        chance = _chance(embeddings, split)
        if not chance < _HIGHEST_CHANCE:
            raise ModelError(
                f"The base model must tell texts apart, but its embeddings of different "
                f"{split.name} texts have a mean cosine of {chance:.4f}. Was it trained?"
            )
        return {"embeddings": embeddings}

    def rows(self, reference: Reference, split: Split, start: int, stop: int) -> Reference:
        """See `Task.rows`; a copy where there are pairs."""
        by_text = reference["embeddings"].view(-1, len(split), reference["embeddings"].shape[1])
        return {"embeddings": by_text[:, start:stop].flatten(0, 1)}

    def score(
        self, module: nn.Module, split: Split, reference: Reference, *, batch_size: int
    ) -> Scores:
        """``cosine`` (n,) to the base, mean over a sequence's texts.

        Where there are pairs also ``embeddings`` (n, 2, width), float32, for the retrieval.
        """
        embeddings = self._embed(module, split, batch_size)
        cosines = (embeddings * reference["embeddings"]).sum(1, dtype=torch.float64)
        # a query and its passage are one sequence: their errors are not independent
        scores = {"cosine": cosines.view(-1, len(split)).mean(0)}
        if _has_pairs(split):
            scores["embeddings"] = embeddings.view(2, len(split), -1).transpose(0, 1)
        return scores

    def damages(self, scores: Scores) -> Tensor:
        """Infidelity of each sequence."""
        return 1.0 - scores["cosine"]

    def summarise(self, scores: Scores, split: Split, reference: Reference) -> Quality:
        """See `Task.summarise`; retained quality is ``(fidelity - c) / (1 - c)``.

        Fidelity is the mean cosine to the base's embedding of the same text, c the mean cosine
        between the base's embeddings of different texts.
        """
        chance = _chance(reference["embeddings"], split)
        fidelity = mean(scores["cosine"])
        retained = affine(fidelity, 1 / (1 - chance), -chance / (1 - chance))
        damage = affine(fidelity, -1.0, 1.0)
        metrics = {"fidelity": fidelity, self.damage: damage}
        if _has_pairs(split):
            metrics["retrieval_accuracy"] = _retrieval(scores["embeddings"])
        return Quality(
            retained=retained.value,
            standard_error=retained.standard_error,
            damage=damage,
            metrics=metrics,
            n_tokens=split.n_tokens,
        )

    def _embed(self, module: nn.Module, split: Split, batch_size: int) -> Tensor:
        """Embeddings of unit length, first texts before positives: (texts, width), float32."""
        texts, padding = _texts(split), pad_token_of(split.examples)
        rows: list[Tensor | None] = [None] * len(texts)
        for group in batch_indices([t.numel() for t in texts], batch_size):
            batch = place(pad_ids([texts[i] for i in group], padding), module)
            with torch.no_grad():
                hidden = module(**batch).last_hidden_state.float()
            pooled = pool(hidden, batch["attention_mask"], self.pooling).cpu()
            for index, row in zip(group, pooled, strict=True):
                rows[index] = row
        return torch.stack([row for row in rows if row is not None])


def mean_cosine_between(embeddings: Tensor) -> float:
    """Mean cosine over all pairs of different rows of unit length, shape ``(n, width)``.

    ``(|sum e|^2 - n) / (n (n - 1))``: the square of the sum holds every ordered pair.
    """
    n = embeddings.shape[0]
    total = embeddings.sum(0, dtype=torch.float64)
    squares = float((embeddings.double() ** 2).sum())
    return (float(total @ total) - squares) / (n * (n - 1))


def _texts(split: Split) -> list[Tensor]:
    names = _TEXTS if _has_pairs(split) else _TEXTS[:1]
    return [example[name] for name in names for example in split.examples]


def _has_pairs(split: Split) -> bool:
    return _TEXTS[1] in split.examples[0]


def _chance(embeddings: Tensor, split: Split) -> float:
    """Mean cosine of different passages (of the texts where there are no pairs)."""
    return mean_cosine_between(embeddings[-len(split) :])


def _retrieval(embeddings: Tensor) -> Measurement:
    """How often a query's nearest passage is its own; embeddings (n, 2, width)."""
    queries, passages = (embeddings[:, i].contiguous() for i in range(2))
    similarity = queries @ passages.T
    hits = (similarity.argmax(1) == torch.arange(len(queries))).double()
    return mean(hits.masked_fill(similarity.isnan().any(1), torch.nan))


TASKS.add(FeatureExtraction.name, FeatureExtraction())
