"""Passages of running text, and questions for them."""

from __future__ import annotations

import re

PASSAGE_CHARACTERS = 600
_MIN_QUERY_WORDS = 5
_MIN_REST_WORDS = 15

_BLANK_LINE = re.compile(r"\n\s*\n")
_UNDERLINE = re.compile(r"^\W{3,}$", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z])")


def passages(text: str, characters: int = PASSAGE_CHARACTERS) -> list[str]:
    """Consecutive paragraphs joined until they hold at least `characters`.

    White space is collapsed, and lines that only underline a heading are dropped. No character is
    in two passages.
    """
    found: list[str] = []
    current: list[str] = []
    for paragraph in _BLANK_LINE.split(_UNDERLINE.sub("", text)):
        words = " ".join(paragraph.split())
        if not words:
            continue
        current.append(words)
        if sum(map(len, current)) >= characters:
            found.append(" ".join(current))
            current = []
    if current:
        found.append(" ".join(current))
    return found


def inverse_cloze(passage: str) -> tuple[str, str] | None:
    """The passage's first sentence as a query for the rest of it, or None if it is too short.

    Lee, Chang, Toutanova 2019, Latent Retrieval for Weakly Supervised Open Domain Question
    Answering, section 4 (there a random sentence).
    """
    first, _, rest = _partition(passage)
    if len(first.split()) < _MIN_QUERY_WORDS or len(rest.split()) < _MIN_REST_WORDS:
        return None
    return first, rest


def _partition(passage: str) -> tuple[str, str, str]:
    match = _SENTENCE_END.search(passage)
    if match is None:
        return passage, "", ""
    return passage[: match.start()], match.group(), passage[match.end() :]
