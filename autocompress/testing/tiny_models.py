"""Tiny models of every supported family, built from their configurations without a network.

They are real transformers models, only small: two blocks, grouped-query attention where the family
has it, an intermediate width that no group size of 64 divides, tied embeddings where the family
ties them. `save_tiny` writes one with a working tokenizer or image processor; `train_briefly` gives
it structure worth preserving.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from autocompress.core import derived_seed
from autocompress.core.errors import UnknownNameError, nearest
from autocompress.models.experts import has_experts, separate_experts, stack_experts
from autocompress.models.quiet import quiet_transformers
from autocompress.testing.tiny_families import (
    BOS,
    EOS,
    IMAGE_SIZE,
    MASK,
    N_CLASSES,
    PAD,
    TINY_FAMILIES,
    UNK,
    Family,
    Sizes,
)

__all__ = [
    "BOS",
    "EOS",
    "FAMILIES",
    "IMAGE_SIZE",
    "MASK",
    "N_CLASSES",
    "PAD",
    "UNK",
    "Sizes",
    "auto_class_of",
    "save_tiny",
    "tiny_batches",
    "tiny_model",
    "tiny_tokenizer",
    "train_briefly",
]

_SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
_TEXT_CHARACTERS = 200_000

Batch = dict[str, Tensor]


FAMILIES: tuple[str, ...] = tuple(TINY_FAMILIES)


def auto_class_of(family: str) -> str:
    """Name of the transformers Auto class that loads the family's tiny model."""
    return _family(family).auto_class


def tiny_model(family: str, *, seed: int = 0, sizes: Sizes | None = None) -> nn.Module:
    """A randomly initialised float32 model in evaluation mode; equal seeds give equal weights.

    Experts are layers of their own, as in a loaded model.

    Raises:
        UnknownNameError: no such family.
    """
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed("tiny model", family, seed))
        return separate_experts(_family(family).build(sizes or Sizes()).eval())


def save_tiny(
    family: str,
    path: Path,
    *,
    model: nn.Module | None = None,
    seed: int = 0,
    sizes: Sizes | None = None,
) -> Path:
    """Write a tiny model with its tokenizer or image processor, as `from_pretrained` reads it.

    Args:
        family: one of `FAMILIES`.
        path: folder to write into.
        model: the model to write, e.g. one that was trained; `tiny_model` makes it otherwise.
        seed: of the weights.
        sizes: of the model.
    """
    model = tiny_model(family, seed=seed, sizes=sizes) if model is None else model
    if has_experts(model):
        model = stack_experts(copy.deepcopy(model))
    with quiet_transformers():
        model.save_pretrained(path)  # type: ignore[operator]  # every family is a PreTrainedModel
    if family == "vit":
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        hf.ViTImageProcessorPil(size=size).save_pretrained(path)
    else:
        tiny_tokenizer(family, (sizes or Sizes()).vocabulary).save_pretrained(path)
    return path


def tiny_tokenizer(family: str, vocabulary: int = 320) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that reads any text.

    Decoder-only families frame a text as ``<s> text``, all others as ``<s> text </s>``.
    """
    causal = auto_class_of(family) == "AutoModelForCausalLM"
    tokenizer = Tokenizer.from_str(_trained_tokenizer(vocabulary))
    frame = "<s> $A" if causal else "<s> $A </s>"
    pair = f"{frame} $B:1" if causal else f"{frame} $B:1 </s>:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, pair=pair, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    model: nn.Module = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    return model


def tiny_batches(
    family: str,
    *,
    n_batches: int = 2,
    batch_size: int = 4,
    length: int = 32,
    padded: bool = True,
    seed: int = 0,
) -> list[Batch]:
    """Model inputs for a family, with labels where its task has them.

    Texts come from the Python documentation. Sequences have different lengths if `padded`, filled
    up on the right. Labels can be learnt: the next token, the masked token, the source itself
    (seq2seq), a class that the first token or the mean brightness decides.
    """
    generator = torch.Generator().manual_seed(derived_seed("tiny batches", family, seed))
    make = _BATCHES[auto_class_of(family)]
    return [make(generator, (batch_size, length), padded) for _ in range(n_batches)]


def train_briefly(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int = 200,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> float:
    """Train in place on the batches in turn; returns the mean loss of the last tenth of the steps.

    Two hundred steps on 32 batches of 8 x 64 tokens take a few seconds on one core and bring a
    causal model's perplexity from the vocabulary's size to a tenth of it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses: list[float] = []
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed("train briefly", seed))
        model.train()
        for batch in islice(cycle(batches), steps):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _family(name: str) -> Family:
    if name not in TINY_FAMILIES:
        raise UnknownNameError(f"Unknown tiny model {name!r}. {nearest(name, TINY_FAMILIES)}")
    return TINY_FAMILIES[name]


def _text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))[:_TEXT_CHARACTERS]


@lru_cache(maxsize=4)
def _trained_tokenizer(vocabulary: int) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_text()], trainer)
    text: str = tokenizer.to_str()
    return text


@lru_cache(maxsize=1)
def _text_tokens() -> Tensor:
    tokenizer = Tokenizer.from_str(_trained_tokenizer(Sizes().vocabulary))
    return torch.tensor(tokenizer.encode(_text()).ids)


def _sequences(generator: torch.Generator, shape: tuple[int, int], padded: bool) -> Batch:
    """Windows of text behind a ``<s>``, cut to random lengths of at least half if `padded`."""
    count, length = shape
    tokens = _text_tokens()
    starts = torch.randint(len(tokens) - length, (count, 1), generator=generator)
    ids = tokens[starts + torch.arange(length)]
    ids[:, 0] = BOS
    lengths = torch.full((count, 1), length)
    if padded:
        lengths = torch.randint(length // 2, length + 1, (count, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def _causal(generator: torch.Generator, shape: tuple[int, int], padded: bool) -> Batch:
    batch = _sequences(generator, shape, padded)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def _masked(generator: torch.Generator, shape: tuple[int, int], padded: bool) -> Batch:
    batch = _sequences(generator, shape, padded)
    ids = batch["input_ids"]
    hidden = (torch.rand(ids.shape, generator=generator) < 0.15) & (batch["attention_mask"] == 1)
    return {
        "input_ids": ids.masked_fill(hidden, MASK),
        "attention_mask": batch["attention_mask"],
        "labels": ids.masked_fill(~hidden, -100),
    }


def _seq2seq(generator: torch.Generator, shape: tuple[int, int], padded: bool) -> Batch:
    batch = _sequences(generator, shape, padded)
    half = shape[1] // 2  # every source is at least that long
    mask = _sequences(generator, (shape[0], half), padded)["attention_mask"]
    return {**batch, "labels": batch["input_ids"][:, :half].masked_fill(mask == 0, -100)}


def _classified(generator: torch.Generator, shape: tuple[int, int], padded: bool) -> Batch:
    batch = _sequences(generator, shape, padded)
    return {**batch, "labels": batch["input_ids"][:, 1] % N_CLASSES}


def _images(generator: torch.Generator, shape: tuple[int, int], _padded: bool) -> Batch:
    labels = torch.randint(N_CLASSES, (shape[0],), generator=generator)
    noise = torch.randn(shape[0], 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    brightness = (labels - (N_CLASSES - 1) / 2).view(-1, 1, 1, 1)
    return {"pixel_values": 0.5 * noise + brightness, "labels": labels}


_BATCHES: dict[str, Callable[[torch.Generator, tuple[int, int], bool], Batch]] = {
    "AutoModelForCausalLM": _causal,
    "AutoModelForMaskedLM": _masked,
    "AutoModelForSeq2SeqLM": _seq2seq,
    "AutoModelForSequenceClassification": _classified,
    "AutoModelForImageClassification": _images,
    "AutoModel": _sequences,
}
