"""Tiny models with their encoded data, built once for all tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import nn

from autocompress.evaluate import TASKS, Corpus, Split, Task, load_corpus
from autocompress.testing.tiny_models import tiny_model, tiny_tokenizer

FAMILY_OF_TASK = {
    "causal-lm": "llama",
    "masked-lm": "bert",
    "seq2seq-lm": "bart",
    "text-classification": "bert-classifier",
    "image-classification": "vit",
    "feature-extraction": "bert-encoder",
}


@dataclass(frozen=True)
class Setting:
    """A task with a tiny model and a few sequences that the model can be scored on."""

    task: Task
    module: nn.Module
    split: Split

    def fresh_module(self) -> nn.Module:
        """The same model again, to be damaged by a test."""
        module = tiny_model(FAMILY_OF_TASK[self.task.name])
        module.load_state_dict(self.module.state_dict())
        return module


@pytest.fixture(params=sorted(FAMILY_OF_TASK))
def setting(request: pytest.FixtureRequest) -> Setting:
    return make_setting(request.param)


@lru_cache
def make_setting(name: str) -> Setting:
    task, family = TASKS[name], FAMILY_OF_TASK[name]
    module = tiny_model(family)
    processor = None if family == "vit" else tiny_tokenizer(family)
    examples = task.encode(
        _corpus(task), processor, sequence_length=48, seed=3, config=module.config
    )
    split = Split.of("search", examples[:12])
    if "classification" in name:
        split = _with_mostly_right_labels(task, module, split)
    return Setting(task, module, split)


def _corpus(task: Task) -> Corpus:
    if task.name == "image-classification":
        digits = load_corpus("digits", kind=task.corpus_kind)
        return digits.subset([i for i, label in enumerate(digits.labels) if label in range(4)][:30])
    docs = load_corpus("python-docs")
    if task.name == "text-classification":
        words = docs.texts[0].split()
        texts = [" ".join(words[i * 7 : i * 7 + 5 + i]) for i in range(12)]
        return Corpus("labelled", texts=tuple(texts), labels=tuple(i % 4 for i in range(12)))
    if task.name == "feature-extraction":
        return load_corpus("python-docs", kind=task.corpus_kind)
    return Corpus("docs", texts=tuple(text[:2000] for text in docs.texts[:4]))


def _with_mostly_right_labels(task: Task, module: nn.Module, split: Split) -> Split:
    """Labels that an untrained model gets right at three quarters of the examples."""
    head = module.classifier
    with torch.no_grad():
        head.weight *= 20
        # spread the answers over the classes, so that no constant answer is as good
        head.bias -= _logits(task, module, split).mean(0)
    logits = _logits(task, module, split)
    answers = logits.argmax(1)
    wrong = torch.arange(len(split)) % 4 == 3
    labels = torch.where(wrong, (answers + 1) % logits.shape[1], answers)
    examples = [{**e, "labels": y} for e, y in zip(split.examples, labels, strict=True)]
    return Split.of("search", examples)


def _logits(task: Task, module: nn.Module, split: Split) -> torch.Tensor:
    singles = (task.batches(Split.of("x", [e]), 1)[0] for e in split.examples)
    with torch.no_grad():
        return torch.cat([module(**batch).logits for batch in singles])
