from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autocompress.core.errors import DataError, ModelError
from autocompress.evaluate import TASKS, Corpus, Split
from autocompress.evaluate.tasks.feature_extraction import mean_cosine_between
from autocompress.testing.tiny_models import tiny_tokenizer

TASK = TASKS["feature-extraction"]


class Lookup(nn.Module):
    """An encoder whose hidden state is a row of a table; a text is one token."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


def token(i: int) -> torch.Tensor:
    return torch.tensor([i])


TEXTS = Split.of("search", [{"input_ids": token(i)} for i in range(6)])
PAIRS = Split.of(
    "search", [{"input_ids": token(i), "positive_input_ids": token(i + 6)} for i in range(6)]
)


def table(rows: int, seed: int = 0) -> torch.Tensor:
    return 1.0 + torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def measure(base: torch.Tensor, model: torch.Tensor, split: Split):
    reference = TASK.reference(Lookup(base), split, batch_size=4)
    return TASK.measure(Lookup(model), split, reference, batch_size=4)


def test_fidelity_is_corrected_by_the_cosine_of_different_texts():
    base, model = table(6), table(6) + 0.5 * table(6, seed=1)
    e, f = (torch.nn.functional.normalize(t, dim=1) for t in (base, model))
    cosine = float((e * f).sum(1).mean())
    chance = float((e @ e.T)[~torch.eye(6, dtype=torch.bool)].mean())
    got = measure(base, model, TEXTS)
    assert got.metrics["fidelity"].value == pytest.approx(cosine, rel=1e-5)
    assert got.damage.value == pytest.approx(1 - cosine, rel=1e-4)
    assert got.retained == pytest.approx((cosine - chance) / (1 - chance), rel=1e-5)
    spread = float((e * f).sum(1).std()) / 6**0.5
    assert got.standard_error == pytest.approx(spread / (1 - chance), rel=1e-4)


def test_a_model_that_answers_like_another_text_retains_about_nothing():
    base = table(200)
    split = Split.of("search", [{"input_ids": token(i)} for i in range(200)])
    assert measure(base, base.roll(1, 0), split).retained == pytest.approx(0.0, abs=0.05)


def test_retrieval_counts_queries_whose_nearest_passage_is_their_own():
    base = torch.eye(12)[:, :12]
    base[:6] = base[6:]  # query i is passage i
    assert measure(base, base, PAIRS).metrics["retrieval_accuracy"].value == 1.0
    swapped = base.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert measure(base, swapped, PAIRS).metrics["retrieval_accuracy"].value == pytest.approx(4 / 6)


def test_retrieval_needs_pairs():
    assert "retrieval_accuracy" not in measure(table(6), table(6), TEXTS).metrics


def test_the_cosine_of_different_rows_matches_the_whole_matrix():
    e = torch.nn.functional.normalize(table(9), dim=1)
    expected = float((e @ e.T)[~torch.eye(9, dtype=torch.bool)].mean())
    assert mean_cosine_between(e) == pytest.approx(expected, rel=1e-6)


def test_a_base_that_cannot_tell_texts_apart_is_refused():
    with pytest.raises(ModelError, match="tell texts apart"):
        TASK.reference(Lookup(torch.ones(6, 4)), TEXTS, batch_size=4)


def test_pairs_are_encoded_as_query_and_passage_and_both_are_batched():
    corpus = Corpus("x", pairs=(("a query", "its long passage"), ("another", "with its own")))
    tokenizer = tiny_tokenizer("bert-encoder")
    examples = TASK.encode(corpus, tokenizer, sequence_length=32, seed=0)
    assert set(examples[0]) == {"input_ids", "positive_input_ids", "pad_token_id"}
    split = Split.of("search", examples)
    assert sum(len(b["input_ids"]) for b in TASK.batches(split, 3)) == 4


def test_images_are_no_texts():
    corpus = Corpus("digits", images=(torch.zeros(1, 8, 8),))
    with pytest.raises(DataError, match="reads text"):
        TASK.encode(corpus, tiny_tokenizer("bert-encoder"), sequence_length=32, seed=0)
