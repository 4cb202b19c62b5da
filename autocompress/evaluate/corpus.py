"""A corpus: data as it was read, before any tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from autocompress.core import digest
from autocompress.core.errors import DataError, nearest

Label = int | str


@dataclass(frozen=True)
class Corpus:
    """Texts, pairs of texts or images, with labels where the data has them.

    Exactly one of `texts`, `pairs` and `images` is filled.

    Attributes:
        source: what the user named it by; appears in messages.
        texts: documents or rows, in the order of the file.
        pairs: (source, target) or (query, passage that answers it).
        images: shape ``(channels, height, width)``, float32 in [0, 1].
        labels: one for each text or image, or none at all.
    """

    source: str
    texts: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    images: tuple[Tensor, ...] = ()
    labels: tuple[Label, ...] = ()

    def __post_init__(self) -> None:
        filled = [items for items in (self.texts, self.pairs, self.images) if items]
        if not filled:
            raise DataError(f"The data {self.source!r} is empty. Name data with rows.")
        if len(filled) > 1:
            raise DataError(f"The data {self.source!r} must hold texts, pairs or images: only one.")
        if self.labels and len(self.labels) != len(filled[0]):
            raise DataError(
                f"Each row needs one label, but {self.source!r} has {len(filled[0])} rows and "
                f"{len(self.labels)} labels."
            )

    def __len__(self) -> int:
        return len(self.texts or self.pairs or self.images)

    @property
    def digest(self) -> str:
        """Of texts, pairs and labels; stable across processes. Images count by number only."""
        return digest([self.texts, self.pairs, len(self.images), self.labels])

    def subset(self, rows: Sequence[int]) -> Corpus:
        """These rows, in the given order."""
        return replace(
            self,
            texts=tuple(self.texts[i] for i in rows) if self.texts else (),
            pairs=tuple(self.pairs[i] for i in rows) if self.pairs else (),
            images=tuple(self.images[i] for i in rows) if self.images else (),
            labels=tuple(self.labels[i] for i in rows) if self.labels else (),
        )


def label_ids(corpus: Corpus, config: object) -> list[int]:
    """Labels as the model numbers them.

    Numbers stay as they are; names are looked up in the config's ``label2id``.

    Raises:
        DataError: there are no labels, a name is unknown, or a number is out of range.
    """
    if not corpus.labels:
        raise DataError(
            f"This task needs labels, but {corpus.source!r} has none. Give a .jsonl, .csv or "
            ".parquet file with the columns text and label (or image and label)."
        )
    known: Mapping[str, int] = getattr(config, "label2id", None) or {}
    n_labels = int(getattr(config, "num_labels", 0) or 0)
    return [_label_id(label, known, n_labels, corpus.source) for label in corpus.labels]


def _label_id(label: Label, known: Mapping[str, int], n_labels: int, source: str) -> int:
    if isinstance(label, str) and label in known:
        return int(known[label])
    if isinstance(label, str) and not label.strip().lstrip("-").isdecimal():
        raise DataError(
            f"The label {label!r} in {source!r} is not one of the model's. {nearest(label, known)}"
        )
    number = int(label)
    if number < 0 or (n_labels and number >= n_labels):
        raise DataError(
            f"The label {number} in {source!r} is out of range: the model has {n_labels} labels, "
            f"numbered from 0. Name the labels as the model does "
            f"({', '.join(list(known)[:5])}), or use a model that was trained on this data."
        )
    return number
