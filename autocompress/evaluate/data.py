"""`load_corpus`: everything that can be named as data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from autocompress.core import Registry, derived_seed
from autocompress.core.errors import DataError, nearest
from autocompress.evaluate.builtin_data import digits, python_docs
from autocompress.evaluate.corpus import Corpus, Label
from autocompress.evaluate.hub_data import read_directory, read_hub
from autocompress.evaluate.images import read_image
from autocompress.evaluate.passages import inverse_cloze, passages
from autocompress.evaluate.readers import (
    SUFFIXES,
    TEXT_SUFFIXES,
    Row,
    missing_file,
    read_rows,
    read_text,
)
from autocompress.evaluate.task import CorpusKind

MAX_CHARACTERS = 32_000_000
MAX_IMAGES = 20_000

CORPORA: Registry[Callable[[], Corpus]] = Registry("data set", "autocompress.corpora")
CORPORA.add("python-docs", python_docs)
CORPORA.add("digits", digits)

# The first name is the one that messages ask for; the others are what public data sets use.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "content"),
    "label": ("label", "labels"),
    "image": ("image", "img", "path"),
    "source": ("source", "document", "article"),
    "target": ("target", "summary", "highlights"),
    "query": ("query", "question", "anchor"),
    "positive": ("positive", "passage", "answer"),
}


def load_corpus(name_or_path: str, *, kind: CorpusKind | str = CorpusKind.TEXT) -> Corpus:
    """Read data by name or path.

    Args:
        name_or_path: a registered name (``python-docs``, ``digits``); a .txt, .md, .jsonl, .csv or
            .parquet file; a directory written by ``datasets``' ``save_to_disk``; or a data set on
            the Hugging Face hub, written ``name[:configuration[:split]]``.
        kind: what the task reads, `Task.corpus_kind`. Columns are ``text``; ``text, label``;
            ``image, label``; ``source, target`` or ``text``; ``query, positive`` or ``text``.

    Returns:
        The corpus; of very large data a part that does not depend on the order of the rows' labels.

    Raises:
        DataError: missing, empty, damaged, lacking a column, or of the wrong kind for the task.
    """
    kind = CorpusKind(kind)
    return _bounded(_read(name_or_path, kind))


def _read(name: str, kind: CorpusKind) -> Corpus:
    if name in CORPORA:
        return _of_kind(CORPORA[name](), kind)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_rows(name, read_directory(path), kind, path)
    if path.suffix.lower() in TEXT_SUFFIXES:
        text = read_text(path)
        return _of_kind(Corpus(name, texts=(text,) if text.strip() else ()), kind)
    if path.is_file():
        return _from_rows(name, read_rows(path), kind, path.parent)
    if path.suffix.lower() in SUFFIXES or name.startswith(("/", "./", "../", "~")):
        raise missing_file(path)
    return _from_rows(name, read_hub(name, known=tuple(CORPORA)), kind, Path())


def _of_kind(corpus: Corpus, kind: CorpusKind) -> Corpus:
    """A corpus of running text or of labelled images as the task wants it."""
    if corpus.images:
        if kind is not CorpusKind.LABELLED_IMAGES:
            raise _wrong_kind(corpus.source, "images", kind)
        return corpus
    if kind in (CorpusKind.TEXT, CorpusKind.TEXT_PAIRS):
        return corpus
    if kind is CorpusKind.PASSAGES:
        return _with_queries(corpus)
    raise _wrong_kind(corpus.source, "plain text", kind)


def _with_queries(corpus: Corpus) -> Corpus:
    """Passages of the documents, each with its first sentence as query where all allow it."""
    found = [passage for text in corpus.texts for passage in passages(text)]
    pairs = tuple(pair for pair in map(inverse_cloze, found) if pair is not None)
    if len(pairs) >= len(found) // 2 > 0:
        return Corpus(corpus.source, pairs=pairs)
    return Corpus(corpus.source, texts=tuple(found))


def _wrong_kind(source: str, got: str, kind: CorpusKind) -> DataError:
    columns = {
        CorpusKind.LABELLED_TEXT: "a .jsonl, .csv or .parquet file with the columns text and label",
        CorpusKind.LABELLED_IMAGES: "'digits', or a file with the columns image and label",
    }.get(kind, "text, e.g. 'python-docs' or a .txt file")
    return DataError(
        f"The task needs {kind.value}, but {source!r} holds {got}. Give {columns}, or choose "
        "another --task."
    )


def _from_rows(source: str, rows: Sequence[Row], kind: CorpusKind, folder: Path) -> Corpus:
    columns = tuple(dict.fromkeys(name for row in rows[:100] for name in row))
    if kind is CorpusKind.LABELLED_IMAGES:
        cells = _column(rows, "image", columns, source)
        images = tuple(read_image(cell, folder, source) for cell in cells)
        return Corpus(source, images=images, labels=_labels(rows, columns, source))
    if kind is CorpusKind.LABELLED_TEXT:
        texts = _texts(rows, "text", columns, source)
        return Corpus(source, texts=texts, labels=_labels(rows, columns, source))
    pair = {CorpusKind.TEXT_PAIRS: ("source", "target"), CorpusKind.PASSAGES: ("query", "positive")}
    if kind in pair and _named(pair[kind][0], columns):
        first, second = (_texts(rows, name, columns, source) for name in pair[kind])
        pairs = tuple((a, b) for a, b in zip(first, second, strict=True) if a and b)
        return Corpus(source, pairs=pairs)
    texts = _texts(rows, "text", columns, source)
    return Corpus(source, texts=tuple(text for text in texts if text.strip()))


def _named(name: str, columns: Sequence[str]) -> str | None:
    return next((column for column in _COLUMNS[name] if column in columns), None)


def _column(rows: Sequence[Row], name: str, columns: Sequence[str], source: str) -> list[object]:
    column = _named(name, columns)
    if column is None:
        raise DataError(
            f"The task needs the column {name!r}, but {source!r} has none. "
            f"{nearest(name, columns)} Rename one."
        )
    cells = [row.get(column) for row in rows]
    if None in cells:
        raise DataError(
            f"Each row needs the column {column!r}, but row {cells.index(None) + 1} of "
            f"{source!r} has none."
        )
    return cells


def _texts(rows: Sequence[Row], name: str, columns: Sequence[str], source: str) -> tuple[str, ...]:
    cells = _column(rows, name, columns, source)
    for number, cell in enumerate(cells, start=1):
        if not isinstance(cell, str):
            raise DataError(
                f"The column {name!r} holds text, but row {number} of {source!r} holds a "
                f"{type(cell).__name__}."
            )
    return tuple(str(cell) for cell in cells)


def _labels(rows: Sequence[Row], columns: Sequence[str], source: str) -> tuple[Label, ...]:
    cells = _column(rows, "label", columns, source)
    for number, cell in enumerate(cells, start=1):
        if isinstance(cell, bool) or not isinstance(cell, int | str):
            raise DataError(
                f"A label is a whole number or a name, but row {number} of {source!r} holds "
                f"{cell!r}."
            )
    return tuple(cell for cell in cells if isinstance(cell, int | str))


def _bounded(corpus: Corpus) -> Corpus:
    """A part of a very large corpus: rows drawn at random, or the start of a single document."""
    if len(corpus.texts) == 1:
        return Corpus(corpus.source, (corpus.texts[0][:MAX_CHARACTERS],), labels=corpus.labels)
    sizes = _sizes(corpus)
    budget = MAX_IMAGES if corpus.images else MAX_CHARACTERS
    if sum(sizes) <= budget:
        return corpus
    order = list(range(len(sizes)))
    random.Random(derived_seed("bounded corpus")).shuffle(order)
    taken: list[int] = []
    total = 0
    for row in order:
        total += sizes[row]
        if total > budget and taken:
            break
        taken.append(row)
    return corpus.subset(sorted(taken))


def _sizes(corpus: Corpus) -> list[int]:
    if corpus.images:
        return [1] * len(corpus.images)
    if corpus.pairs:
        return [len(a) + len(b) for a, b in corpus.pairs]
    return [len(text) for text in corpus.texts]
