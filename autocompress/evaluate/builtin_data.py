"""Data that needs no network: Python's own documentation, and scikit-learn's digits."""

from __future__ import annotations

import re

import torch

from autocompress.evaluate.corpus import Corpus

_BLANK_LINE = re.compile(r"\n\s*\n")


def python_docs() -> Corpus:
    """The language reference that ``help()`` shows, part of every Python.

    About 80 English documents, 360 000 characters; a little more with each version. The topics
    quote each other (a fifth of them is repetition), so a paragraph is kept only where it comes
    first: no text can be in two splits.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts = (_unseen_paragraphs(topics[name], seen) for name in sorted(topics))
    return Corpus("python-docs", texts=tuple(text for text in texts if text))


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs in `seen`, to which its own are added."""
    kept = []
    for paragraph in _BLANK_LINE.split(text):
        words = " ".join(paragraph.split())
        if words not in seen:
            seen.add(words)
            kept.append(paragraph)
    return "\n\n".join(kept).strip()


def digits() -> Corpus:
    """1797 handwritten digits, 8 x 8 pixels, with their labels (UCI, through scikit-learn)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).float().div(16.0)[:, None]
    return Corpus("digits", images=tuple(pixels), labels=tuple(int(t) for t in bunch.target))
