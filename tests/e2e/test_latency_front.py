"""A search for latency: times measured on this machine, three objectives, front and export."""

from __future__ import annotations

import json

import pytest

from .conftest import SMALL


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_front_of_quality_bytes_and_measured_latency(trained, cli, tmp_path):
    profile, out = tmp_path / "here.json", tmp_path / "run"
    model = trained("llama")
    measured = cli("device", "--model", model, "--space", "quick", "--tokens", 1, "--out", profile)
    assert measured.status == 0, measured.err
    wanted = ("--optimize", "quality,latency,bytes")
    settings = ("--space", "quick", "--device-profile", profile, "--no-finalize", *SMALL)
    searched = cli("search", model, *settings, *wanted, "--budget", "10 trials", "--out", out)
    assert searched.status == 0, searched.err
    front = json.loads((out / "front.json").read_text())
    assert front["optimize"] == "quality,latency,bytes"
    origins = {m["resources"]["latency_ms_per_token"]["origin"] for m in front["members"]}
    assert all(origin.startswith("measured on ") for origin in origins), origins
    assert len(front["members"]) > 2
    points = [(-m["quality"]["retained"], m["storage_bytes"], latency(m)) for m in front["members"]]
    assert not any(beats(a, b) for a in points for b in points)

    other = cli("search", model, *settings, "--budget", "12 trials", "--out", out, "--resume")
    assert other.status == 2
    assert "optimize" in other.err

    fastest = min(front["members"], key=latency)
    limit = repr(latency(fastest) * (1 + 1e-9))
    picked = cli("pick", out, "--max-latency-ms", limit, "--by", "quality", "--json")
    assert picked.document["id"] == fastest["id"] or latency(picked.document) <= latency(fastest)
    written = cli("export", out, fastest["id"][:12], "--out", tmp_path / "fastest")
    assert written.status == 0, written.err


def latency(member):
    return member["resources"]["latency_ms_per_token"]["value"]


def beats(a, b):
    """No worse in all, and better in one by more than rounding."""
    close = [abs(x - y) <= 1e-9 * abs(y) for x, y in zip(a, b, strict=True)]
    return all(c or x < y for c, x, y in zip(close, a, b, strict=True)) and not all(close)
