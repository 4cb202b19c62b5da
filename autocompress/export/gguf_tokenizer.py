"""A tokenizer as GGUF metadata: tokens, their kinds, merges or scores, and what frames a text.

Two of llama.cpp's tokenizers cover the architectures that files are written for:

* byte-level BPE (``gpt2``): tokens and merges as they are, and the name of the rule that splits a
  text into words, which llama.cpp has compiled in and which is therefore recognised, not written;
* SentencePiece BPE (``llama``): tokens with scores. Merging the pair of highest score is merging
  the pair of lowest rank if a token's score is minus the rank of the first merge that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_BYTE_LEVEL = "ByteLevel"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
"""Word splits by their regular expression, and llama.cpp's name for each."""

_SPACE = "\u2581"
_UNMERGED = -1e6  # score of a token that no merge makes


def tokenizer_refusal(processor: Any) -> str:
    """Why a tokenizer cannot be written: the rule, what was got; empty if it can."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return (
            "llama.cpp reads the tokenizer from the file, so the model must have a fast one "
            f"(tokenizer.json), but got {type(processor).__name__}."
        )
    content = json.loads(backend.to_str())
    kind = content["model"]["type"]
    if kind != "BPE":
        return f"tokenizers must be byte-level or SentencePiece BPE, but got {kind}."
    if _is_byte_level(content):
        return (
            ""
            if _word_split(content)
            else (
                "llama.cpp must have the rule that splits a text into words compiled in (gpt-2, "
                f"smollm, llama-bpe or qwen2), but got {content['pre_tokenizer']}."
            )
        )
    if not content["model"].get("byte_fallback"):
        return "BPE that is not byte-level must fall back to bytes, but this one does not."
    return ""


def add_tokenizer(writer: Any, processor: Any, n_rows: int) -> None:
    """Write a tokenizer that `tokenizer_refusal` takes.

    Args:
        writer: a `gguf.GGUFWriter`.
        processor: transformers tokenizer.
        n_rows: of the embedding; tokens beyond them are left out, rows without a token get a
            placeholder, since llama.cpp wants one token per row.
    """
    content = json.loads(processor.backend_tokenizer.to_str())
    tokens, kinds = _tokens(content, n_rows)
    if _is_byte_level(content):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_word_split(content))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(pair) for pair in _merges(content)])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(content, tokens))
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(_prefixes_space(content))
    _add_frame(writer, processor, n_rows)


def _tokens(content: Mapping[str, Any], n_rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of the token of each row."""
    from gguf import TokenType

    model, byte_level = content["model"], _is_byte_level(content)
    tokens = [f"[PAD{row}]" for row in range(n_rows)]
    kinds = [int(TokenType.UNUSED)] * n_rows
    for token, row in model["vocab"].items():
        if row < n_rows:
            is_byte = not byte_level and len(token) == 6 and token.startswith("<0x")
            tokens[row] = token
            kinds[row] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in content["added_tokens"]:
        if added["id"] < n_rows:
            text = added["content"]
            special = added["special"]
            tokens[added["id"]] = text if special or byte_level else text.replace(_SPACE, " ")
            kinds[added["id"]] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    unknown = model.get("unk_token")
    if not byte_level and unknown in tokens:
        kinds[tokens.index(unknown)] = int(TokenType.UNKNOWN)
    return tokens, kinds


def _merges(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = content["model"]["merges"]
    pairs = (tuple(merge.split(" ", 1)) if isinstance(merge, str) else merge for merge in found)
    return [(left, right) for left, right in pairs]


def _scores(content: Mapping[str, Any], tokens: list[str]) -> list[float]:
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(content)):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else _UNMERGED for token in tokens]


def _add_frame(writer: Any, processor: Any, n_rows: int) -> None:
    """Special tokens, those that open and close a text, and the chat template."""
    kinds = ("bos", "eos", "unk", "pad", "sep", "mask")
    ids = {kind: getattr(processor, f"{kind}_token_id", None) for kind in kinds}
    for kind, token in ids.items():
        if token is not None and token < n_rows:
            getattr(writer, f"add_{kind}_token_id")(token)
    framed = processor("a")["input_ids"]
    writer.add_add_bos_token(ids["bos"] is not None and framed[0] == ids["bos"])
    writer.add_add_eos_token(ids["eos"] is not None and framed[-1] == ids["eos"])
    template = getattr(processor, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    return any(step["type"] == _BYTE_LEVEL for step in _steps(content["pre_tokenizer"]))


def _word_split(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits words; empty if it has none."""
    steps = _steps(content["pre_tokenizer"])
    if steps[-1]["type"] != _BYTE_LEVEL or steps[-1].get("add_prefix_space"):
        return ""
    kinds = [step["type"] for step in steps[:-1]]
    if steps[-1].get("use_regex", True):
        return {"": "gpt-2", "Digits": "smollm"}.get(" ".join(kinds), "")
    if kinds != ["Split"]:
        return ""
    return _SPLITS.get(steps[0]["pattern"].get("Regex", ""), "")


def _prefixes_space(content: Mapping[str, Any]) -> bool:
    """True if a SentencePiece tokenizer puts a space before a text."""
    if any(step["type"] == "Prepend" for step in _steps(content["normalizer"], "normalizers")):
        return True
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(content["pre_tokenizer"])
    )


def _steps(part: Mapping[str, Any] | None, inner: str = "pretokenizers") -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, a sequence unrolled."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]
