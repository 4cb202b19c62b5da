"""A model that is too large for its device is an error that says what to do."""

import pytest
import torch

from autocompress.core.errors import UsageError
from autocompress.search.memory import enough_memory
from autocompress.testing.tiny_models import save_tiny
from autocompress.workflows import session as module
from autocompress.workflows.session import open_session
from autocompress.workflows.settings import SearchSettings

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words.")


def full(*_, **__):
    raise FULL


@pytest.fixture
def settings(tmp_path):
    return SearchSettings(
        model=str(save_tiny("llama", tmp_path / "model")), calibration_tokens=64, search_tokens=64,
        report_tokens=64, sequence_length=32, token_weighting="none",
    )  # fmt: skip


def test_loading_the_model(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_base_model", full)
    with pytest.raises(UsageError, match=r"Loading .* ran out: CUDA out of memory.*Next step"):
        open_session(settings, tmp_path)


@pytest.mark.parametrize(
    ("step", "ask", "need"),
    [
        ("load_base_model", lambda s: s.plan(), "Measuring forwards takes the model in float32"),
        ("plan_forward", lambda s: s.plan(), "Measuring forwards takes the model in float32"),
        ("collect_curvature", lambda s: s.searched_curvature, "Curvature takes"),
        ("collect_statistics", lambda s: s.statistics("float32"), "Layer statistics take"),
    ],
)
def test_what_a_search_needs_beside_it(settings, tmp_path, monkeypatch, step, ask, need):
    session = open_session(settings, tmp_path)
    monkeypatch.setattr(module, step, full)
    with pytest.raises(UsageError, match=rf"{need}.*--sequence-length, or a machine with more"):
        ask(session)


def test_outputs_of_the_base_model(settings, tmp_path, monkeypatch):
    session = open_session(settings, tmp_path)
    monkeypatch.setattr(type(session.task), "reference", full)
    with pytest.raises(UsageError, match="outputs take float32 activations"):
        session.reference(session.base.module, session.splits.search, 4)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough memory: 9 bytes")])
def test_a_gpu_may_be_done_without(error):
    wanted = pytest.raises(UsageError, match="or --device cpu, or a GPU with more")
    with wanted, enough_memory("cuda:1", "This takes a lot"):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape"), enough_memory("cpu", "This takes a lot"):
        raise RuntimeError("a shape does not fit")
