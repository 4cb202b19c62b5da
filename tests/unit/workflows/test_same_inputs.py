"""A run is gone on with by the model and the data that it was measured with."""

from __future__ import annotations

import json

import pytest

from autocompress.core.errors import UsageError
from autocompress.testing.tiny_models import save_tiny
from autocompress.workflows.export import require_same_inputs
from autocompress.workflows.search import study_record
from autocompress.workflows.session import open_session
from autocompress.workflows.settings import SearchSettings

TOKENS = {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64}


@pytest.fixture
def settings(tmp_path):
    save_tiny("llama", tmp_path / "model")
    write_text(tmp_path / "text.jsonl", "words")
    return SearchSettings(
        str(tmp_path / "model"), data=str(tmp_path / "text.jsonl"), space="quick", dtype="float32",
        sequence_length=16, **TOKENS,
    )  # fmt: skip


def write_text(path, noun):
    rows = [json.dumps({"text": f"{i} {noun} to read, and {i * 7} others."}) for i in range(99)]
    path.write_text("\n".join(rows))


def test_a_run_is_not_gone_on_with_by_other_data(settings, tmp_path):
    session = open_session(settings, tmp_path / "cache")
    record = study_record(session)
    require_same_inputs(session, record)
    write_text(tmp_path / "text.jsonl", "books")
    now = open_session(settings, tmp_path / "cache")
    with pytest.raises(
        UsageError, match=r"other data than .*text.jsonl.*Next step: restore the da"
    ):
        require_same_inputs(now, record)
    with pytest.raises(UsageError, match=r"but the data changed \("):
        study_record(now, record)


def test_a_run_is_not_gone_on_with_by_another_model(settings, tmp_path):
    record = study_record(open_session(settings, tmp_path / "cache"))
    save_tiny("llama", tmp_path / "model", seed=1)
    now = open_session(settings, tmp_path / "cache")
    with pytest.raises(UsageError, match=r"other weights than .*model now holds"):
        require_same_inputs(now, record)
    with pytest.raises(UsageError, match=r"but the model changed \("):
        study_record(now, record)
