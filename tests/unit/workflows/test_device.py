"""Measuring a machine: plausible rates, and a profile that the command line takes."""

import json

import pytest

from autocompress.cli import run
from autocompress.core.errors import UsageError
from autocompress.cost import find_profile
from autocompress.workflows import device


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(device, "_MATRIX_BYTES", 1 << 20)
    monkeypatch.setattr(device, "_TOKENS", 8)


def test_the_rates_are_those_of_a_computer(small):
    profile = device.measure_device()
    assert 1e7 < profile.flops_per_second < 1e16
    assert 1e7 < profile.bytes_per_second < 1e14
    assert profile.memory_bytes > 1 << 28
    assert "float32" in profile.origin


def test_a_slow_dtype_is_left_out(small, monkeypatch):
    monkeypatch.setattr(device, "_worthwhile", lambda dtype, _: dtype == "float32")
    assert "bfloat16" not in device.measure_device().origin


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="--device cpu"):
        device.measure_device("cuda:99")


def test_the_command_writes_what_a_search_takes(small, tmp_path, capsys):
    path = tmp_path / "here.json"
    assert run(["device", "--out", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(path.read_text()) == printed
    assert find_profile(str(path)).to_json().items() <= printed.items()
