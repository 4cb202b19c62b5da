"""Tiny trained models on disk, and the command line as a function."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from autocompress.evaluate import Example, Task

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@dataclass(frozen=True)
class Finished:
    """A finished command line."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)


Cli = Callable[..., Finished]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs ``autocompress ...`` in this process."""
    from autocompress.cli import run

    def call(*arguments: object) -> Finished:
        capsys.readouterr()
        status = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    return call


def most_mixed(members: list[dict[str, Any]]) -> dict[str, Any]:
    """Of those that no baseline is, the member with most different schemes."""
    assert len(members) > 1
    proposed = [member for member in members if "name" not in member]
    assert proposed, "nothing but baselines is on the front"
    return max(proposed, key=lambda member: len(set(member["allocation"].values())))


def spread(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Smallest, middle and largest of at least two members: an export takes seconds."""
    assert len(members) > 1
    return [members[place] for place in sorted({0, len(members) // 2, len(members) - 1})]


def reloads_as_claimed(cli: Cli, run: Path, member: dict[str, Any], out: Path) -> None:
    """Export a member to `out`: a fresh process finds the quality and bytes that the front says."""
    written = cli("export", run, member["id"][:12], "--out", out)
    assert written.status == 0, written.err
    manifest = json.loads((out / "autocompress.json").read_text())
    assert manifest["verification"]["passed"]
    assert manifest["storage_bytes"] == member["storage_bytes"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a briefly trained tiny model of a family; made once per session."""
    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp("models") / family
            made[family] = _digits_vit(path) if family == "vit" else _trained(family, path)
        return made[family]

    return directory


def _trained(family: str, path: Path) -> Path:
    from autocompress.testing.tiny_models import save_tiny, tiny_batches, tiny_model, train_briefly

    model = tiny_model(family)
    save_tiny(family, path, model=model)  # with the processor that a search will load
    if family == "bert-classifier":  # has to learn the class of every first token
        train_briefly(model, tiny_batches(family, n_batches=40, batch_size=32), steps=400)
    elif family != "bert-encoder":  # a plain encoder has no loss to train on
        _learn_by_heart(model, family, path)
    return save_tiny(family, path, model=model)


def _learn_by_heart(model: Any, family: str, path: Path) -> None:
    """Teach a model the very tokens of `SMALL`, so that fewer bits retain clearly less.

    A model that hardly knows them retains as much, or more, whatever is done to it: the front
    would be the smallest baseline alone.
    """
    from autocompress.evaluate import TASKS, make_splits
    from autocompress.evaluate.splits import Split
    from autocompress.models.loading import load_processor
    from autocompress.testing.tiny_models import auto_class_of, train_briefly

    tasks = [TASKS[name] for name in TASKS]
    task = next(task for task in tasks if task.auto_class == auto_class_of(family))
    examples = _encoded(task, load_processor(str(path)), model.config)
    dealt = make_splits(examples, seed=0, **_TOKENS)
    parts = (dealt.calibration, dealt.search, dealt.report)
    seen = Split.of("seen", (example for part in parts for example in part.examples))
    batches = [{"labels": b["input_ids"], **b} for b in task.batches(seen, 10)]
    train_briefly(model, batches, steps=100, learning_rate=5e-3)


def _digits_vit(path: Path) -> Path:
    """A vision transformer that reads scikit-learn's digits well above chance."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from autocompress.evaluate import TASKS
    from autocompress.testing.tiny_models import save_tiny, train_briefly

    config = ViTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_labels=10,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    examples = _encoded(TASKS["image-classification"], None, config)
    batches = [
        {n: torch.stack([e[n] for e in examples[i : i + 64]]) for n in ("pixel_values", "labels")}
        for i in range(0, len(examples), 64)
    ]
    train_briefly(model, batches, steps=150, learning_rate=1e-3)
    return save_tiny("vit", path, model=model)


def _encoded(task: Task, processor: object, config: object) -> list[Example]:
    """The task's own data, as a search with `SMALL` reads it."""
    from autocompress.evaluate import load_corpus

    corpus = load_corpus(str(task.default_data), kind=task.corpus_kind)
    return task.encode(corpus, processor, sequence_length=_LENGTH, seed=0, config=config)


_LENGTH = 64
_TOKENS = {"calibration_tokens": 1024, "search_tokens": 512, "report_tokens": 1024}

SMALL = (
    *(part for name, n in _TOKENS.items() for part in (f"--{name.replace('_', '-')}", str(n))),
    "--sequence-length", str(_LENGTH), "--dtype", "float32",
)  # fmt: skip
"""Enough tokens to tell a good allocation from a broken one on a tiny model."""
