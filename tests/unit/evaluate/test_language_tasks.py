from __future__ import annotations

import math

import pytest
import torch

from autocompress.core.errors import DataError, ModelError
from autocompress.evaluate import TASKS, Corpus, Split, load_corpus
from autocompress.evaluate.tasks import language
from autocompress.testing.tiny_models import BOS, EOS, MASK, tiny_model, tiny_tokenizer


def docs(n: int = 3, characters: int = 1500) -> Corpus:
    texts = load_corpus("python-docs").texts[:n]
    return Corpus("docs", texts=tuple(text[:characters] for text in texts))


def encode(name: str, family: str, length: int = 32, corpus: Corpus | None = None, seed: int = 0):
    return TASKS[name].encode(
        corpus or docs(), tiny_tokenizer(family), sequence_length=length, seed=seed
    )


def naive_nll(module, task, split: Split) -> list[float]:
    """Mean loss of each sequence as transformers computes it, times its number of targets."""
    sums = []
    for example in split.examples:
        batch = task.batches(Split.of("x", [example]), 1)[0]
        labels = batch.get("labels", example.get("labels", batch["input_ids"]))
        labels = labels.view(1, -1)
        with torch.no_grad():
            loss = module(**{**batch, "labels": labels}).loss
        shift = 1 if task.name == "causal-lm" else 0
        sums.append(float(loss) * int((labels[:, shift:] != -100).sum()))
    return sums


@pytest.mark.parametrize(
    ("name", "family"), [("causal-lm", "gpt2"), ("masked-lm", "roberta"), ("seq2seq-lm", "t5")]
)
def test_perplexity_is_what_the_loss_of_transformers_says(name, family):
    task, module = TASKS[name], tiny_model(family)
    split = Split.of("search", encode(name, family)[:6])
    reference = task.reference(module, split, batch_size=3)
    quality = task.measure(module, split, reference, batch_size=3)
    expected = math.exp(sum(naive_nll(module, task, split)) / reference["nll"].numel())
    assert quality.metrics["perplexity"].value == pytest.approx(expected, rel=1e-4)


def test_retained_quality_is_the_ratio_of_perplexities():
    task, base, other = TASKS["causal-lm"], tiny_model("llama"), tiny_model("llama", seed=1)
    split = Split.of("search", encode("causal-lm", "llama")[:8])
    reference = task.reference(base, split, batch_size=4)
    at_base, at_other = (task.measure(m, split, reference, batch_size=4) for m in (base, other))
    ratio = at_base.metrics["perplexity"].value / at_other.metrics["perplexity"].value
    assert at_other.retained == pytest.approx(ratio, rel=1e-6)


def test_the_paired_error_is_smaller_than_that_of_the_perplexity():
    task, base = TASKS["causal-lm"], tiny_model("llama")
    other = tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight *= 1.1
    split = Split.of("search", encode("causal-lm", "llama")[:20])
    reference = task.reference(base, split, batch_size=4)
    quality = task.measure(other, split, reference, batch_size=4)
    perplexity = quality.metrics["perplexity"]
    assert quality.standard_error / quality.retained < perplexity.standard_error / perplexity.value


def test_scoring_a_few_positions_at_a_time_changes_nothing(monkeypatch):
    task, base, other = TASKS["causal-lm"], tiny_model("llama"), tiny_model("llama", seed=1)
    split = Split.of("search", encode("causal-lm", "llama")[:6])
    whole = task.measure(other, split, task.reference(base, split, batch_size=4), batch_size=4)
    monkeypatch.setattr(language, "_CHUNK_LOGITS", {"cpu": 1000})
    monkeypatch.setattr(language, "_BATCH_LOGITS", 1)
    pieces = task.measure(other, split, task.reference(base, split, batch_size=4), batch_size=4)
    assert pieces.retained == pytest.approx(whole.retained, rel=1e-5)
    assert pieces.damage.value == pytest.approx(whole.damage.value, rel=1e-5)


def test_causal_windows_share_no_token_and_start_as_the_tokenizer_starts():
    tokenizer = tiny_tokenizer("llama")
    corpus = docs()
    examples = encode("causal-lm", "llama", 20, corpus)
    assert all(e["input_ids"].shape == (20,) and e["input_ids"][0] == BOS for e in examples)
    joined = torch.cat([e["input_ids"][1:] for e in examples])
    text = tokenizer.decode(joined)
    assert "\n\n".join(corpus.texts).startswith(text[:3000])


def test_a_long_text_that_is_repeated_at_another_offset_is_read_once():
    once = docs()
    headings = tuple(part for text in once.texts for part in ("A heading", text))
    corpus = Corpus("twice", texts=(*headings, "x", *once.texts, f" {once.texts[0]}\n"))
    first = encode("causal-lm", "llama", 20, Corpus("once", texts=(*headings, "x")))
    again = encode("causal-lm", "llama", 20, corpus)
    assert len(again) == len(first) > 50
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(again, first, strict=True)
    )


def test_masked_places_depend_on_content_and_seed_and_never_hit_special_tokens():
    one, again = (encode("masked-lm", "bert", 40) for _ in range(2))
    other = encode("masked-lm", "bert", 40, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, again, strict=True))
    assert any(
        not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True)
    )
    for example in one:
        masked = example["input_ids"] == MASK
        assert torch.equal(masked, example["labels"] != -100)
        assert int(masked.sum()) == round(0.15 * 38)
        assert (example["input_ids"][0], example["input_ids"][-1]) == (BOS, EOS)


def test_plain_text_becomes_source_and_the_text_that_follows_it():
    tokenizer = tiny_tokenizer("bart")
    corpus = docs(1)
    first = encode("seq2seq-lm", "bart", 40, corpus)[0]
    assert first["input_ids"].shape == first["labels"].shape == (20,)
    decoded = [
        tokenizer.decode(first[n], skip_special_tokens=True) for n in ("input_ids", "labels")
    ]
    assert corpus.texts[0].startswith("".join(decoded))


def test_pairs_become_source_and_target_of_their_own_lengths():
    corpus = Corpus("pairs", pairs=(("a b c d e f g", "x"), ("h", "y z " * 50)))
    examples = encode("seq2seq-lm", "bart", 30, corpus)
    assert examples[0]["input_ids"].numel() > examples[0]["labels"].numel()
    assert examples[1]["labels"].numel() == 30
    assert int(examples[0]["n_tokens"]) == sum(
        examples[0][n].numel() for n in ("input_ids", "labels")
    )


def test_sequences_never_exceed_what_the_config_allows():
    config = tiny_model("llama").config
    config.max_position_embeddings = 24
    config.pad_token_id = None
    examples = TASKS["causal-lm"].encode(
        docs(), tiny_tokenizer("llama"), sequence_length=500, seed=0, config=config
    )
    assert examples[0]["input_ids"].shape == (24,)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_longest_sequence_fits_the_position_embeddings(family):
    task, module = TASKS["masked-lm"], tiny_model(family)
    examples = task.encode(
        docs(), tiny_tokenizer(family), sequence_length=10_000, seed=0, config=module.config
    )
    split = Split.of("search", examples[:2])
    assert task.reference(module, split, batch_size=2)["nll"].isfinite().all()


def test_padding_is_what_the_model_calls_padding():
    config = tiny_model("llama").config
    config.pad_token_id = 2
    examples = TASKS["causal-lm"].encode(
        docs(), tiny_tokenizer("llama"), sequence_length=32, seed=0, config=config
    )
    assert int(examples[0]["pad_token_id"]) == 2


def test_text_shorter_than_one_sequence_is_an_error_that_says_how_long_it_is():
    with pytest.raises(DataError, match=r"holds \d+ tokens, less than one sequence of 64"):
        encode("causal-lm", "llama", 64, Corpus("mine.txt", texts=("A few words.",)))


def test_a_sequence_that_special_tokens_fill_is_refused():
    with pytest.raises(DataError, match="--sequence-length is 3"):
        encode("masked-lm", "bert", 3)


def test_a_model_without_tokenizer_is_refused():
    with pytest.raises(ModelError, match="needs a tokenizer, but the model came with none"):
        TASKS["causal-lm"].encode(docs(), None, sequence_length=32, seed=0)


def test_a_tokenizer_without_a_mask_cannot_do_masked_lm():
    tokenizer = tiny_tokenizer("llama")
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="mask token"):
        TASKS["masked-lm"].encode(docs(), tokenizer, sequence_length=32, seed=0)
