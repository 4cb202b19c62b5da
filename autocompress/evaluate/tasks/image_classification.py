"""Image classification: accuracy and KL of the class probabilities to the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.evaluate.corpus import Corpus, label_ids
from autocompress.evaluate.images import ImageGeometry, to_pixels
from autocompress.evaluate.splits import Example
from autocompress.evaluate.task import TASKS, CorpusKind
from autocompress.evaluate.tasks.classification import ClassificationTask


class ImageClassification(ClassificationTask):
    """One label per image."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    corpus_kind = CorpusKind.LABELLED_IMAGES
    default_data = "digits"
    summary = "one label per image: accuracy and KL of the class probabilities to the base model"

    def encode(
        self,
        corpus: Corpus,
        processor: object,
        *,
        sequence_length: int,  # noqa: ARG002 - the model's patches decide it
        seed: int,  # noqa: ARG002 - nothing is drawn
        config: object = None,
    ) -> list[Example]:
        """``pixel_values`` (channels, height, width), float32, and ``labels`` (a scalar)."""
        geometry = ImageGeometry.of(processor, config)
        labels = label_ids(corpus, config)
        n_tokens = torch.tensor(geometry.n_tokens)
        return [
            {
                "pixel_values": to_pixels(image, geometry),
                "labels": torch.tensor(label),
                "n_tokens": n_tokens,
            }
            for image, label in zip(corpus.images, labels, strict=True)
        ]

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([e["pixel_values"] for e in examples])}


TASKS.add(ImageClassification.name, ImageClassification())
