from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autocompress.core.errors import DataError, ModelError
from autocompress.evaluate import TASKS, Corpus, Split, load_corpus
from autocompress.evaluate.corpus import label_ids
from autocompress.evaluate.images import ImageGeometry, to_pixels
from autocompress.testing.tiny_models import tiny_tokenizer

TASK = TASKS["image-classification"]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


class Constant(nn.Module):
    """A classifier whose logits are given: image i, a single pixel, holds its row number."""

    def __init__(self, logits: torch.Tensor, **config: object) -> None:
        super().__init__()
        self.table = nn.Parameter(logits, requires_grad=False)
        self.config = SimpleNamespace(num_labels=logits.shape[1], **config)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[pixel_values[:, 0, 0, 0].long()])


def answers(*classes: int, confidence: float = 4.0) -> Constant:
    return Constant(confidence * torch.nn.functional.one_hot(torch.tensor(classes), 3).float())


SPLIT = Split.of(
    "search",
    [
        {"pixel_values": torch.full((1, 1, 1), float(i)), "labels": y, "n_tokens": torch.tensor(5)}
        for i, y in enumerate(LABELS)
    ],
)


def test_retained_quality_is_accuracy_above_the_best_constant_answer():
    base = answers(0, 1, 2, 0, 1, 2, 0, 0)  # 7 of 8; always answering 0 has 3 of 8
    model = answers(0, 1, 2, 0, 1, 0, 1, 1)  # 6 of 8
    reference = TASK.reference(base, SPLIT, batch_size=3)
    quality = TASK.measure(model, SPLIT, reference, batch_size=3)
    assert quality.metrics["accuracy"].value == 6 / 8
    assert quality.retained == pytest.approx((6 / 8 - 3 / 8) / (7 / 8 - 3 / 8))
    assert quality.metrics["top1_agreement"].value == 5 / 8
    assert quality.standard_error > 0


def test_a_model_that_beats_the_base_retains_more_than_all():
    base, model = answers(0, 1, 2, 0, 1, 2, 0, 0), answers(*LABELS.tolist())
    reference = TASK.reference(base, SPLIT, batch_size=8)
    assert TASK.measure(model, SPLIT, reference, batch_size=8).retained > 1


def test_damage_is_the_divergence_of_the_class_probabilities():
    base, model = answers(*LABELS.tolist()), answers(*LABELS.tolist(), confidence=2.0)
    reference = TASK.reference(base, SPLIT, batch_size=8)
    quality = TASK.measure(model, SPLIT, reference, batch_size=8)
    p, q = base.table.softmax(1), model.table.softmax(1)
    assert quality.retained == 1.0
    assert quality.damage.value == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)


def test_a_base_that_is_no_better_than_chance_is_refused():
    with pytest.raises(ModelError, match=r"is 0\.375 and the best constant answer has 0\.375"):
        TASK.reference(answers(*[0] * 8), SPLIT, batch_size=8)


@pytest.mark.parametrize(
    "module",
    [
        Constant(torch.zeros(8, 1)),
        Constant(torch.zeros(8, 3), problem_type="multi_label_classification"),
    ],
)
def test_regression_and_multi_label_models_are_refused(module):
    with pytest.raises(ModelError, match="picks one of at least two labels"):
        TASK.reference(module, SPLIT, batch_size=8)


CONFIG = SimpleNamespace(num_labels=3, label2id={"negative": 0, "neutral": 1, "positive": 2})


def labelled(*labels: int | str) -> Corpus:
    return Corpus("reviews.csv", texts=tuple("abc"[: len(labels)]), labels=labels)


def test_labels_are_numbers_or_the_names_of_the_model():
    assert label_ids(labelled(2, "1", "negative"), CONFIG) == [2, 1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, "positve"), "Did you mean 'positive'"),
        ((0, 3), "out of range: the model has 3 labels"),
        ((0, -1), "out of range"),
        ((), "has none"),
    ],
)
def test_labels_that_the_model_does_not_have_are_refused(labels, message):
    corpus = labelled(*labels) if labels else Corpus("plain.txt", texts=("a",))
    with pytest.raises(DataError, match=message):
        label_ids(corpus, CONFIG)


def test_texts_are_cut_to_the_sequence_length():
    corpus = Corpus("x", texts=("one two three " * 40, "four"), labels=(0, 1))
    long, short = TASKS["text-classification"].encode(
        corpus, tiny_tokenizer("bert-classifier"), sequence_length=16, seed=0, config=CONFIG
    )
    assert long["input_ids"].shape == (16,)
    assert short["input_ids"].numel() < 16
    assert (int(long["labels"]), int(short["labels"])) == (0, 1)


def test_classifiers_on_decoders_without_padding_get_one_text_at_a_time():
    sizes = []

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.config = SimpleNamespace(num_labels=2, vocab_size=9, pad_token_id=None)

        def forward(self, input_ids, attention_mask):
            sizes.append(len(input_ids))
            return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids[:, 0], 2).float())

    examples = [
        {"input_ids": torch.tensor([i % 2, *[3] * i]), "labels": torch.tensor(i % 2)}
        for i in range(6)
    ]
    task = TASKS["text-classification"]
    task.reference(Decoder(), Split.of("search", examples), batch_size=4)
    assert sizes == [1] * 6


def test_images_get_the_size_channels_and_scale_that_the_model_wants():
    config = SimpleNamespace(image_size=16, patch_size=4, num_channels=3)
    processor = {"image_mean": [0.0, 0.0, 0.0], "image_std": [0.5, 0.5, 0.5]}
    geometry = ImageGeometry.of(processor, config)
    assert geometry.n_tokens == 17
    pixels = to_pixels(torch.full((1, 8, 8), 0.75), geometry)
    assert pixels.shape == (3, 16, 16)
    assert torch.allclose(pixels, torch.tensor(1.5))


@pytest.mark.parametrize("size", [{"height": 10, "width": 12}, {"shortest_edge": 10}, (10, 12), 10])
def test_the_processor_says_the_size_where_the_config_does_not(size):
    geometry = ImageGeometry.of(SimpleNamespace(size=size), None)
    assert geometry.height == 10
    assert geometry.mean == (0.5, 0.5, 0.5)


def test_a_model_without_an_image_size_is_refused():
    with pytest.raises(ModelError, match="no image size"):
        ImageGeometry.of(None, SimpleNamespace())


def test_digits_keep_their_labels_and_range():
    corpus = load_corpus("digits", kind=TASK.corpus_kind)
    assert len(corpus) == len(corpus.labels) == 1797
    assert set(corpus.labels) == set(range(10))
    stacked = torch.stack(corpus.images)
    assert stacked.shape == (1797, 1, 8, 8)
    assert (float(stacked.min()), float(stacked.max())) == (0.0, 1.0)
