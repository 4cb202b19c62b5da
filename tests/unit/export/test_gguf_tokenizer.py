"""Tokenizers in GGUF metadata: what llama.cpp makes of a text is what the tokenizer makes of it."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from autocompress.export.gguf_tokenizer import _SPLITS, add_tokenizer, tokenizer_refusal
from autocompress.testing.tiny_models import tiny_tokenizer

gguf = pytest.importorskip("gguf")

TEXT = "The model's 3 budgets, like  this:\n\tdef f(x): return x ** 2  # é, 漢, 1234\n"
SPACE = "\u2581"


@lru_cache(maxsize=2)
def sentencepiece(prefix: bool) -> transformers.PreTrainedTokenizerFast:
    """A byte-fallback BPE tokenizer of the form of Llama's (with a prefix) or Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator("\n".join(topics.values()).split("\n")[:800], trainer)
    learned = _with_bytes(tokenizer, bytes_)
    learned.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    learned.add_tokens([AddedToken(f"<end{SPACE}of>", normalized=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=learned, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _with_bytes(tokenizer: Tokenizer, bytes_: list[str]) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(bytes_)}
    return Tokenizer.from_str(json.dumps(content))


def written(processor: Any, rows: int, path: Path) -> dict[str, Any]:
    """The tokenizer's metadata, by key without the prefix, as another program reads them."""
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, processor, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(path).fields
    prefix = "tokenizer."
    return {k.removeprefix(prefix): f.contents() for k, f in fields.items() if k.startswith(prefix)}


def merged_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece BPE in its plainest form: merge the best pair until none is a token."""
    found = {token: row for row, token in enumerate(tokens)}
    symbols = list(text.replace(" ", SPACE))
    while True:
        pairs = [a + b for a, b in pairwise(symbols)]
        known = [(scores[found[pair]], -i) for i, pair in enumerate(pairs) if pair in found]
        if not known:
            break
        at = -max(known)[1]
        symbols[at : at + 2] = [pairs[at]]
    pieces = [
        [symbol] if symbol in found else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        for symbol in symbols
    ]
    return [found[piece] for parts in pieces for piece in parts]


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_make_the_merges_of_the_tokenizer(prefix: bool, tmp_path: Path) -> None:
    processor = sentencepiece(prefix)
    fields = written(processor, len(processor), tmp_path / "t.gguf")
    assert fields["ggml.model"] == "llama"
    assert fields["ggml.add_space_prefix"] is prefix
    text = SPACE + TEXT if prefix else TEXT
    expected = processor(TEXT, add_special_tokens=False)["input_ids"]
    assert merged_by_score(text, fields["ggml.tokens"], fields["ggml.scores"]) == expected


def test_kinds_of_tokens(tmp_path: Path) -> None:
    processor = sentencepiece(False)
    fields = written(processor, len(processor) + 2, tmp_path / "t.gguf")
    kinds = dict(zip(fields["ggml.tokens"], fields["ggml.token_type"], strict=True))
    kind = gguf.TokenType
    assert kinds["<unk>"] == kind.UNKNOWN
    assert kinds["<s>"] == kind.CONTROL
    assert kinds["<0x0A>"] == kind.BYTE
    assert kinds["<end of>"] == kind.USER_DEFINED
    assert kinds["th"] == kind.NORMAL
    assert kinds[f"[PAD{len(processor) + 1}]"] == kind.UNUSED
    assert fields["ggml.unknown_token_id"] == 0
    assert fields["ggml.add_bos_token"] is False


def test_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    processor = sentencepiece(False)
    fields = written(processor, len(processor) - 1, tmp_path / "t.gguf")
    assert len(fields["ggml.tokens"]) == len(processor) - 1
    assert "<end of>" not in fields["ggml.tokens"]


def test_a_byte_level_tokenizer_keeps_tokens_merges_and_frame(tmp_path: Path) -> None:
    processor = tiny_tokenizer("llama")
    processor.chat_template = "{{ messages }}"
    fields = written(processor, 320, tmp_path / "t.gguf")
    assert (fields["ggml.model"], fields["ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["ggml.tokens"] == processor.convert_ids_to_tokens(range(320))
    assert fields["ggml.merges"][1] == "Ġ t"
    assert fields["ggml.bos_token_id"] == 1
    assert (fields["ggml.add_bos_token"], fields["ggml.add_eos_token"]) == (True, False)
    assert fields["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("split", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        *(
            (
                pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(pattern), "isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                ),
                name,
            )
            for pattern, name in _SPLITS.items()
        ),
    ],
)
def test_word_splits_are_recognised(split: Any, name: str, tmp_path: Path) -> None:
    processor = tiny_tokenizer("llama")
    processor.backend_tokenizer.pre_tokenizer = split
    assert tokenizer_refusal(processor) == ""
    assert written(processor, 320, tmp_path / "t.gguf")["ggml.pre"] == name


def test_splits_are_those_of_transformers() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for pattern, name in _SPLITS.items():
        assert GGUF_PRE_TOKENIZER_SPLITS[name] in (pattern, pattern.replace(r"\p{L}+|", ""))


@pytest.mark.parametrize(
    ("model", "split", "reason"),
    [
        (models.WordPiece(unk_token="<unk>"), None, "but got WordPiece"),
        (models.BPE(), None, "must fall back to bytes"),
        (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True), "compiled in"),
    ],
)
def test_other_tokenizers_are_refused(model: Any, split: Any, reason: str) -> None:
    tokenizer = Tokenizer(model)
    if split is not None:
        tokenizer.pre_tokenizer = split
    processor = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert reason in tokenizer_refusal(processor)


def test_a_model_without_a_fast_tokenizer_is_refused() -> None:
    assert "but got NoneType" in tokenizer_refusal(None)
