"""Timing a model's layers: every option of the space has its time, and a search takes it."""

from __future__ import annotations

import json

import pytest

from autocompress.cli import run
from autocompress.core import BASE_ALLOCATION, Allocation
from autocompress.core.errors import UsageError
from autocompress.cost import CostModel, DeviceProfile, find_profile
from autocompress.models import load_base_model
from autocompress.spaces import load_space
from autocompress.testing.tiny_models import save_tiny
from autocompress.workflows import device, latency
from autocompress.workflows.latency import measure_latency

SPACE = """\
schema_version: 1
name: three
description: Nothing, few bits or few dimensions.
choices:
  - roles: [query, key, value, output, up, down]
    options:
      - base
      - quantize: [{method: rtn, bits: [4], group_size: 16}]
      - factorize: [{method: svd, parameter_ratio: [0.5]}]
  - roles: [embedding]
    options: [base, {quantize: [{method: rtn, bits: [8], group_size: 16}]}]
"""
MINE = DeviceProfile("mine", 1e9, 1e9, 1 << 30, "made up")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model and a space file."""
    folder = tmp_path_factory.mktemp("latency")
    (folder / "three.yaml").write_text(SPACE)
    return save_tiny("bert-encoder", folder / "bert"), folder / "three.yaml"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "_SWEEPS", 1)
    monkeypatch.setattr(latency, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(latency, "_AGREE", 1)
    monkeypatch.setattr(device, "_MATRIX_BYTES", 1 << 20)
    monkeypatch.setattr(device, "_TOKENS", 8)


class Told:
    """Keeps what a `Progress` is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.done: list[tuple[int, int]] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def advance(self, done: int, total: int) -> None:
        self.done.append((done, total))


def test_every_option_of_every_layer_is_measured(made):
    model, space = made
    told = Told()
    profile = measure_latency(MINE, str(model), str(space), tokens=(4, 9), progress=told)
    base = load_base_model(str(model), "AutoModel")
    layout = base.layout
    table = profile.latency
    assert table.counts == (4, 9)
    assert table.dtype == "float32"
    n_kinds = len(table.passes[0].layers)
    assert told.steps == [
        f"Measuring {2 * n_kinds} entries ({n_kinds} kinds of layers at 4, 9 tokens) in 3 models"
    ]
    assert told.done[-1] == (3, 3)
    cost = CostModel(layout.layers, layout.other_bytes, 0, profile, 9)
    for choice in load_space(str(space), layout.layers).choices:
        for option in choice.options:
            allocation = Allocation.of(dict(zip(choice.layers, option.schemes, strict=True)))
            latency_of = cost.resources(allocation)["latency_ms_per_token"]
            assert latency_of.origin == "measured on mine in float32"
            assert latency_of.value > 0
    assert cost.resources(BASE_ALLOCATION)["latency_ms_per_token"].value > 0


def test_a_pass_of_the_base_is_predicted_as_it_was_measured(made, monkeypatch):
    wholes = []
    add = latency._Fastest.add

    def noted(self, variant, whole, layers):
        if variant == BASE_ALLOCATION:
            wholes.append(whole)
        add(self, variant, whole, layers)

    monkeypatch.setattr(latency._Fastest, "add", noted)
    model, space = made
    profile = measure_latency(MINE, str(model), str(space), tokens=(4,))
    layout = load_base_model(str(model), "AutoModel").layout
    cost = CostModel(layout.layers, layout.other_bytes, 0, profile, 4)
    predicted = 4e-3 * cost.resources(BASE_ALLOCATION)["latency_ms_per_token"].value
    # layers of equal shape count with their mean, so that sums agree
    assert predicted == pytest.approx(wholes[0])


def test_of_a_large_model_some_layers_stand_for_all(made, monkeypatch):
    model, space = made
    layers = load_base_model(str(model), "AutoModel").layout.layers
    variants = list(latency._variants(load_space(str(space), layers), layers))
    monkeypatch.setattr(latency, "_WEIGHTS_PER_ENTRY", 1)
    few = list(latency._variants(load_space(str(space), layers), layers))
    assert len(few) == len(variants)
    keys = [
        {latency.time_key(x, v.scheme(x.name)) for v in found for x in layers}
        for found in (variants, few)
    ]
    assert keys[0] == keys[1]
    assert 0 < max(map(len, few)) < max(map(len, variants))


def test_rounds_end_when_the_shortest_agree(monkeypatch):
    monkeypatch.setattr(latency, "_LEAST_ROUNDS", 5)
    monkeypatch.setattr(latency, "_AGREE", 3)
    steady, shaken = [1.3, 1.0, 1.01, 1.2, 1.02], [1.0, 1.1, 1.3, 1.2, 1.4]
    assert not latency._goes_on(steady)
    assert latency._goes_on(steady[:4])
    assert latency._goes_on(shaken)
    assert not latency._goes_on(shaken * 8)


def test_the_command_writes_a_profile_that_a_search_finds(made, tmp_path, capsys):
    model, space = made
    path = tmp_path / "here.json"
    arguments = ["--model", str(model), "--space", str(space), "--tokens", "4", "--out", str(path)]
    assert run(["device", *arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    profile = find_profile(str(path))
    assert json.loads(path.read_text()) == printed
    assert profile.to_json().items() <= printed.items()
    assert profile.latency.counts == (4,)


def test_what_makes_no_sense_is_refused_before_anything_is_measured(made, tmp_path, capsys):
    model, space = made
    with pytest.raises(UsageError, match="at least 1 token, but got --tokens 0"):
        measure_latency(MINE, str(model), str(space), tokens=(4, 0))
    assert run(["device", "--tokens", "4"]) == 2
    assert "add --model" in capsys.readouterr().err
    assert run(["device", "--out", str(tmp_path / "x.txt")]) == 2
    assert "x.txt.json" in capsys.readouterr().err
