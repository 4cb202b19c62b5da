"""A picked member is rebuilt, replaces the old one only if it is better, and exports as claimed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from .conftest import SMALL


@pytest.fixture(scope="module")
def run_dir(trained, tmp_path_factory) -> Path:
    """A finished search of a tiny encoder, whose fidelity falls with its bits."""
    from autocompress.cli import run

    out = tmp_path_factory.mktemp("finalize") / "run"
    arguments = ["search", trained("bert-encoder"), "--space", "mixed_precision", "--sampler",
                 "nsga2", "--budget", "8 trials", "--out", out, *SMALL]  # fmt: skip
    assert run([str(a) for a in arguments]) == 0
    return out


@pytest.fixture
def copied(run_dir, tmp_path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


def smallest(directory):
    from autocompress.fronts import FrontDocument

    return FrontDocument.read(directory).members[0]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 6])
def test_a_finalized_member_is_kept_only_if_better_and_exports_as_claimed(
    cli, copied, tmp_path, steps
):
    from autocompress.fronts import FrontDocument

    before = json.loads((copied / "front.json").read_text())
    for member in FrontDocument.read(copied).members:
        finished = cli("finalize", copied, member.id, "--block-steps", steps, "--json")
        assert finished.status == 0, finished.err
        done = finished.document
        if done["replaced"]:
            break
        assert done["reason"]
        assert json.loads((copied / "front.json").read_text()) == before
    assert done["replaced"], "no member of the front could be made better"
    one, two = (done["finalized"][k]["value"] for k in ("search_damage", "rebuilt_damage"))
    assert two < one
    rebuilt = next(m for m in FrontDocument.read(copied).members if m.finalized)
    assert rebuilt.storage_bytes == member.storage_bytes
    assert rebuilt.finalized.searched_as == member.id
    assert rebuilt.finalized.block_steps == steps
    assert "finalized" in cli("front", copied).out
    assert cli("finalize", copied, rebuilt.id).status == 2
    shutil.rmtree(copied / "cache" / "bank")
    exported = cli("export", copied, rebuilt.id, "--out", tmp_path / "a")
    assert exported.status == 0, exported.err
    shutil.rmtree(copied / "cache")
    again = cli("export", copied, rebuilt.id, "--out", tmp_path / "b")
    assert again.status == 0, again.err
    assert "differ" not in again.err
    tensors = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert tensors[0] == tensors[1]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_resumed_search_keeps_what_was_finalized(cli, copied, trained, monkeypatch):
    from autocompress.workflows import finalize

    compare, made = finalize._compare, finalize._rebuilt_member

    def better(*arguments):
        found = compare(*arguments)
        return replace(found, rebuilt_damage=replace(found.search_damage, value=-1.0))

    def no_worse(document, member, *others):
        return replace(made(document, member, *others), quality=member.quality)

    monkeypatch.setattr(finalize, "_compare", better)
    monkeypatch.setattr(finalize, "_rebuilt_member", no_worse)
    done = cli("finalize", copied, smallest(copied).id, "--json").document
    assert done["replaced"]
    compared = json.loads((copied / "front.json").read_text())["comparisons"]
    again = cli(
        "search", trained("bert-encoder"), "--space", "mixed_precision", "--sampler", "nsga2",
        "--budget", "8 trials", "--no-finalize", "--out", copied, "--resume", *SMALL,
    )  # fmt: skip
    assert again.status == 0, again.err
    front = json.loads((copied / "front.json").read_text())
    assert done["member"] in front["members"]
    assert front["comparisons"] == compared
    judged = {c.get("judged", c.get("member")) for c in compared if c.get("sequences")}
    assert done["member"]["id"] in judged


@pytest.mark.slow
def test_a_worse_rebuild_leaves_the_front_as_it_was(cli, copied, monkeypatch):
    from autocompress.workflows import finalize

    real = finalize._compare

    def worse(case, pair):
        found = real(case, pair)
        damage = replace(found.search_damage, value=found.rebuilt_damage.value - 0.1)
        return replace(found, search_damage=damage)

    monkeypatch.setattr(finalize, "_compare", worse)
    before = (copied / "front.json").read_bytes()
    finished = cli("finalize", copied, smallest(copied).id)
    assert finished.status == 0
    assert "stays as it was" in finished.out
    assert (copied / "front.json").read_bytes() == before


def test_unknown_members_and_directories_are_named(cli, run_dir, tmp_path):
    unknown = cli("finalize", run_dir, "nothing")
    assert unknown.status == 2
    assert "No member or baseline is called 'nothing'" in unknown.err
    steps = cli("finalize", run_dir, "x", "--block-steps", -1)
    assert steps.status == 2
    assert "Block steps must be 0 to 10,000, but got -1. The nearest legal value is 0." in steps.err
    missing = cli("finalize", tmp_path / "none", "x")
    assert missing.status == 2
    assert "There is no run directory" in missing.err
