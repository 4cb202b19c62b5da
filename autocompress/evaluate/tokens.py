"""Tokenizers, and running text cut into windows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from autocompress.core.errors import DataError, ModelError
from autocompress.evaluate.corpus import Corpus

_BATCH_OF_TEXTS = 256
_FEW = 4
_LONG_TEXT = 1000  # characters, about a window; shorter texts, as headings, recur by nature

_log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    model_max_length: int
    pad_token_id: int | None
    eos_token_id: int | None
    mask_token_id: int | None

    def __call__(
        self,
        text: Sequence[str],
        *,
        add_special_tokens: bool = ...,
        truncation: bool = ...,
        max_length: int | None = ...,
        verbose: bool = ...,
    ) -> Mapping[str, list[list[int]]]:
        """Token ids of each text under ``input_ids``."""


def as_tokenizer(processor: object, task: str) -> Tokenizer:
    """The processor, if it is a tokenizer; raises `ModelError` if not."""
    if processor is None or not (callable(processor) and hasattr(processor, "model_max_length")):
        raise ModelError(
            f"The task {task} needs a tokenizer, but the model came with {_kind(processor)}. Put "
            "tokenizer.json and tokenizer_config.json beside its weights, or choose another --task."
        )
    return cast(Tokenizer, processor)


def pad_token(tokenizer: Tokenizer, config: object) -> int:
    """The padding token of the model, else of its tokenizer.

    Without one any token will do, as the mask hides it.
    """
    in_config = getattr(config, "pad_token_id", None)
    choices = (in_config, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in choices if isinstance(token, int) and token >= 0)


def longest_sequence(tokenizer: Tokenizer, config: object, wanted: int) -> int:
    """`wanted`, lowered to what the tokenizer and the model's config allow."""
    positions = getattr(config, "max_position_embeddings", None)
    limits = [wanted, int(tokenizer.model_max_length)]
    if isinstance(positions, int) and positions > 0:
        # RoBERTa-like models number positions from their padding token on, so have that many less
        padding = getattr(config, "pad_token_id", None)
        offset = padding + 1 if isinstance(padding, int) and 0 <= padding < _FEW else 0
        limits.append(positions - offset)
    return min(limits)


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> list[Tensor]:
    """Ids of each text with special tokens, cut to `length` tokens; int64."""
    ids: list[Tensor] = []
    for start in range(0, len(texts), _BATCH_OF_TEXTS):
        encoded = tokenizer(
            list(texts[start : start + _BATCH_OF_TEXTS]),
            truncation=True,
            max_length=length,
            verbose=False,
        )
        ids += [torch.tensor(row, dtype=torch.long) for row in encoded["input_ids"]]
    return ids


def affixes(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    probe = ["a"]
    bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"][0])
    full = list(tokenizer(probe)["input_ids"][0])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def windows(
    tokenizer: Tokenizer, corpus: Corpus, length: int, *, with_suffix: bool = True
) -> list[Tensor]:
    """Running text cut into windows that share no token.

    Texts are joined by a blank line, so short rows fill a window together; what is left at the end
    is dropped. A long text that came before is left out: at another offset its windows would be
    others, and could lie in another split than those of the first.

    Args:
        tokenizer: of the model.
        corpus: its texts in order.
        length: tokens of each window, special tokens included.
        with_suffix: end each window with the tokenizer's closing special tokens.

    Returns:
        Tensors of shape ``(length,)``, int64.

    Raises:
        DataError: there is less than one window of text.
    """
    prefix, suffix = affixes(tokenizer)
    suffix = suffix if with_suffix else []
    body = length - len(prefix) - len(suffix)
    if body < 2:
        raise DataError(
            f"A sequence needs at least 2 tokens besides the {len(prefix) + len(suffix)} special "
            f"ones, but --sequence-length is {length}. Raise it."
        )
    stream = list(_stream(tokenizer, _without_repeats(corpus)))
    if len(stream) < body:
        raise DataError(
            f"The data is too short: {corpus.source!r} holds {len(stream)} tokens, less than one "
            f"sequence of {length}. Give more data or lower --sequence-length to at most "
            f"{max(4, len(stream) // 8)}."
        )
    return [
        torch.tensor(prefix + stream[start : start + body] + suffix)
        for start in range(0, len(stream) - body + 1, body)
    ]


def _without_repeats(corpus: Corpus) -> list[str]:
    seen: set[str] = set()
    kept = []
    for text in corpus.texts:
        key = text.strip()
        if key not in seen:
            kept.append(text)
        if len(key) >= _LONG_TEXT:
            seen.add(key)
    n_repeated = len(corpus.texts) - len(kept)
    if n_repeated:
        _log.info(
            "%d long texts of %r were there before and are left out.", n_repeated, corpus.source
        )
    return kept


def _stream(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[int]:
    separator = list(tokenizer(["\n\n"], add_special_tokens=False)["input_ids"][0])
    for start in range(0, len(texts), _BATCH_OF_TEXTS):
        batch = list(texts[start : start + _BATCH_OF_TEXTS])
        for row in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield from row
            yield from separator


def _kind(processor: object) -> str:
    return "none" if processor is None else f"a {type(processor).__name__}"
