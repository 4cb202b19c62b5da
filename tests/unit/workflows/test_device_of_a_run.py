"""A run counts all its costs on one device."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autocompress.core.errors import UsageError
from autocompress.cost import DeviceProfile, write_profile
from autocompress.testing.tiny_models import save_tiny
from autocompress.workflows.finalize import _require_same_device
from autocompress.workflows.search import study_record
from autocompress.workflows.session import open_session
from autocompress.workflows.settings import SearchSettings, StudyRecord

HERE = DeviceProfile("here", 1e11, 2e10, 1 << 34, "measured once")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    words = [json.dumps({"text": f"{i} words to read, and {i * 7} others."}) for i in range(99)]
    (folder / "text.jsonl").write_text("\n".join(words))
    return SearchSettings(
        str(save_tiny("llama", folder / "model")), data=str(folder / "text.jsonl"),
        sequence_length=16, dtype="float32", calibration_tokens=64, search_tokens=64,
        report_tokens=64, space="quick", device_profile=str(folder / "here.json"),
    )  # fmt: skip


def opened(settings, profile, folder):
    write_profile(profile, folder / "here.json")
    return open_session(replace(settings, device_profile=str(folder / "here.json")), folder)


def test_a_run_does_not_go_on_with_the_times_of_another_device(settings, tmp_path):
    record = study_record(opened(settings, HERE, tmp_path))
    record.write(tmp_path)
    record = StudyRecord.read(tmp_path)
    again = opened(settings, replace(HERE, origin="measured once, in other words"), tmp_path)
    assert study_record(again, record).resolved == record.resolved
    _require_same_device(again, record)
    faster = opened(settings, replace(HERE, bytes_per_second=4e10), tmp_path)
    with pytest.raises(
        UsageError, match="device profile of its first run, but the device profile changed"
    ):
        study_record(faster, record)
    with pytest.raises(UsageError, match="is another one now"):
        _require_same_device(faster, record)


def test_a_run_that_did_not_say_its_device_goes_on(settings, tmp_path):
    record = study_record(opened(settings, HERE, tmp_path))
    facts = {name: fact for name, fact in record.resolved.items() if name != "device_digest"}
    session = opened(settings, replace(HERE, bytes_per_second=4e10), tmp_path)
    study_record(session, StudyRecord(record.settings, facts))
    _require_same_device(session, StudyRecord(record.settings, facts))
