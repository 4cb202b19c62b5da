"""A search for a target, its exports in the target's format, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import SMALL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def for_vllm(trained, tmp_path_factory) -> Path:
    """A finished search of a tiny Llama for vLLM."""
    from autocompress.cli import run

    out = tmp_path_factory.mktemp("exports") / "run"
    arguments = ["search", trained("llama"), "--space", _space(out.parent), "--target", "vllm",
                 "--budget", "8 trials", "--out", out, *SMALL]  # fmt: skip
    assert run([str(a) for a in arguments]) == 0
    return out


def _space(directory: Path) -> Path:
    path = directory / "groups.yaml"
    path.write_text(
        "schema_version: 1\nname: groups\ndescription: A test.\nchoices:\n"
        "  - roles: [embedding, head]\n    options: ['rtn(bits=8)', base]\n"
        "  - roles: [query, key, value, output, gate, up, down]\n"
        "    options: ['gptq(bits=4,group_size=32)', 'gptq(bits=3,group_size=32)', 'svd(rank=8)',\n"
        "              'rtn(bits=8,group_size=0)+int_inputs(bits=8)', base]\n"
    )
    return path


@pytest.mark.timeout(400)
def test_every_member_of_a_search_for_vllm_is_verified_in_its_format(for_vllm, cli, tmp_path):
    document = json.loads((for_vllm / "front.json").read_text())
    proposed = [m["id"] for m in document["members"] if "name" not in m]
    members = ["uniform-4bit", proposed[0], proposed[-1]]
    for number, member in enumerate(members):
        out = tmp_path / str(number)
        done = cli("export", for_vllm, member, "--out", out, "--format", "compressed-tensors")
        assert done.status == 0, done.err
        manifest = json.loads((out / "autocompress.json").read_text())
        assert manifest["verification"]["passed"]
        # 16 bytes a layer say its shape
        assert 0 <= manifest["storage_bytes"] - manifest["claim"]["storage_bytes"] <= 16 * 16
        verdict = cli("gate", out, "--max-bytes", manifest["storage_bytes"], "--json")
        assert verdict.status == 0, verdict.err
        assert verdict.document["checks"][0]["value"] == manifest["storage_bytes"]


@pytest.mark.timeout(400)
def test_a_resumed_search_keeps_its_target(for_vllm, trained, cli):
    again = ["search", trained("llama"), "--space", _space(for_vllm.parent), "--budget",
             "9 trials", "--out", for_vllm, "--resume", *SMALL]  # fmt: skip
    other = cli(*again)
    assert other.status == 2
    assert "target (was 'vllm', now 'any')" in other.err
    assert cli(*again, "--target", "vllm").status == 0
    assert len((for_vllm / "trials.jsonl").read_text().splitlines()) == 9


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(trained, cli, tmp_path):
    run = tmp_path / "run"
    searched = cli(
        "search", trained("llama"), "--space", "quick", "--sampler", "random",
        "--budget", "6 trials", "--out", run, *SMALL,
    )  # fmt: skip
    assert searched.status == 0, searched.err
    out = tmp_path / "out"
    refused = cli("export", run, "uniform-4bit", "--out", out, "--format", "compressed-tensors")
    assert refused.status == 2
    assert "compressed-tensors cannot hold layer model.embed_tokens" in refused.err
    assert "--format packed" in refused.err
    unknown = cli("export", run, "uniform-4bit", "--out", out, "--format", "compresed-tensors")
    assert unknown.status == 2
    assert "Did you mean 'compressed-tensors'?" in unknown.err
    assert not out.exists()


def test_spaces_show_says_what_a_target_leaves(trained, cli):
    model = trained("llama")
    whole = cli("spaces", "show", "mixed_precision", "--model", model, "--json").document
    left = cli(
        "spaces", "show", "mixed_precision", "--model", model, "--target", "vllm", "--json"
    ).document
    assert left["n_options"] < whole["n_options"]
    assert set(left["options"]) == {
        "base",
        "gptq(bits=4,group_size=64)",
        "gptq(bits=8,group_size=64)",
    }
