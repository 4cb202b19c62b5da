"""Merged and dropped experts, from a space file to a finalized and reloaded member."""

from __future__ import annotations

import json

import pytest

from .conftest import SMALL, reloads_as_claimed

SPACE = """
schema_version: 1
name: fewer
description: Experts merged in pairs, dropped, or rounded.
ties: {expert_groups: 2, whole_experts: true}
choices:
  - layers: ["*.experts.*"]
    options: [drop, merged+gptq(bits=4), "merged(to=busiest)+gptq(bits=4)+eora(rank=4)"]
  - roles: [query, key, value, output]
    options: [base, rtn(bits=8)]
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_member_with_fewer_experts_reloads_with_the_bytes_and_quality_it_claims(
    trained, cli, tmp_path
):
    (tmp_path / "fewer.yaml").write_text(SPACE)
    out = tmp_path / "run"
    searched = cli(
        "search", trained("mixtral"), "--space", tmp_path / "fewer.yaml", "--sampler", "random",
        "--budget", "8 trials", "--no-finalize", "--out", out, *SMALL,
    )  # fmt: skip
    assert searched.status == 0, searched.err
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert all(trial["status"] in ("complete", "early_stopped") for trial in trials)
    used = set()
    for number, member in enumerate(json.loads((out / "front.json").read_text())["members"]):
        used |= {scheme.partition("(")[0] for scheme in member["allocation"].values()}
        reloads_as_claimed(cli, out, member, tmp_path / f"exported{number}")
    assert used >= {"drop", "merged"}
    finalized = cli("finalize", out, member["id"][:12])
    assert finalized.status == 0, finalized.err
