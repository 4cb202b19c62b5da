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


@pytest.mark.parametrize("space", ["joint", "toolbox", "integer_inputs"])
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
    assert _agree(exported, family)


def _agree(path: Path, family: str) -> bool:
    """Whether the packed model computes on the GPU what it computes on the CPU."""
    import autocompress as ac
    from autocompress.testing.tiny_models import tiny_batches

    batch = tiny_batches(family, n_batches=1)[0]
    outputs = [_output(ac.load(path, device=device), batch) for device in ("cpu", "cuda")]
    difference = (outputs[0] - outputs[1].cpu()).abs().max()
    return bool(difference <= 1e-3 * outputs[0].abs().max())


def _output(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        found = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    logits: torch.Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return logits.float()
