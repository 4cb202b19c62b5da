"""From model to exported, reloaded front member with everything on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from .conftest import SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
    pytest.mark.timeout(300),
]

_DIGITS = {"pixel_values": torch.linspace(-1, 1, 4 * 16 * 16).view(4, 1, 16, 16)}


@pytest.mark.parametrize("space", ["joint", "toolbox", "integer_inputs", "structure"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-encoder", "t5", "vit"])
def test_a_search_on_a_gpu_exports_what_it_measured(family, space, trained, cli, tmp_path):
    out, exported = tmp_path / "run", tmp_path / "exported"
    searched = cli(
        "search", trained(family), "--space", space, "--budget", "14 trials", "--device", "cuda",
        "--out", out, *SMALL,
    )  # fmt: skip
    assert searched.status == 0, searched.err
    member = json.loads((out / "front.json").read_text())["members"][0]["id"]
    written = cli("export", out, member[:12], "--out", exported)
    assert written.status == 0, written.err
    assert json.loads((exported / "autocompress.json").read_text())["verification"]["passed"]
    # Where inputs are rounded, the last bit of a product may decide between two integers.
    assert _difference(exported, family) <= (0.02 if space == "integer_inputs" else 1e-3)


def _difference(path: Path, family: str) -> float:
    """Between what the packed model computes on the CPU and on the GPU, relative, in norm."""
    import autocompress as ac
    from autocompress.testing.tiny_models import tiny_batches

    batch = _DIGITS if family == "vit" else tiny_batches(family, n_batches=1)[0]
    here, there = (_output(ac.load(path, device=device), batch) for device in ("cpu", "cuda"))
    return float((here - there.cpu()).norm() / here.norm())


def _output(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        found = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    logits: torch.Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return logits.float()
