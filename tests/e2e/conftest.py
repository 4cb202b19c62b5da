"""Tiny trained models on disk, and the command line as a function."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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
    if family == "bert-classifier":  # has to learn the class of every first token
        train_briefly(model, tiny_batches(family, n_batches=40, batch_size=32), steps=400)
    elif family != "bert-encoder":  # a plain encoder has no loss to train on
        train_briefly(model, tiny_batches(family, n_batches=16), steps=80)
    return save_tiny(family, path, model=model)


def _digits_vit(path: Path) -> Path:
    """A vision transformer that reads scikit-learn's digits well above chance."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from autocompress.evaluate import TASKS, load_corpus
    from autocompress.testing.tiny_models import save_tiny, train_briefly

    config = ViTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_labels=10,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    task = TASKS["image-classification"]
    corpus = load_corpus("digits", kind=task.corpus_kind)
    examples = task.encode(corpus, None, sequence_length=64, seed=0, config=config)
    batches = [
        {n: torch.stack([e[n] for e in examples[i : i + 64]]) for n in ("pixel_values", "labels")}
        for i in range(0, 1024, 64)
    ]
    train_briefly(model, batches, steps=150)
    return save_tiny("vit", path, model=model)


SMALL = (
    "--calibration-tokens", "1024", "--search-tokens", "512", "--report-tokens", "1024",
    "--sequence-length", "64", "--dtype", "float32",
)  # fmt: skip
"""Enough tokens to tell a good allocation from a broken one on a tiny model."""
