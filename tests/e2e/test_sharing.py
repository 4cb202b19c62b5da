"""Layers that share, from a space file to a finalized and reloaded member."""

from __future__ import annotations

import json

import pytest

from .conftest import SMALL, reloads_as_claimed

SPACE = """
schema_version: 1
name: shared
description: Nothing but layers that share.
choices:
  - roles: [query, key, value, gate, up]
    span: 2
    options:
      - basis_sharing(parameter_ratio=0.5)+gptq(bits=4)+eora(rank=4)
      - basis_sharing(parameter_ratio=0.8)
      - tied+gptq(bits=4)+eora(rank=8)
  - roles: [output, down]
    options: [base, rtn(bits=8)]
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_member_whose_layers_share_reloads_with_the_bytes_and_quality_it_claims(
    trained, cli, tmp_path
):
    (tmp_path / "shared.yaml").write_text(SPACE)
    out = tmp_path / "run"
    searched = cli(
        "search", trained("llama"), "--space", tmp_path / "shared.yaml", "--sampler", "random",
        "--budget", "8 trials", "--no-finalize", "--out", out, *SMALL,
    )  # fmt: skip
    assert searched.status == 0, searched.err
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert all(trial["status"] in ("complete", "early_stopped") for trial in trials)
    members = json.loads((out / "front.json").read_text())["members"]
    assert len(members) > 1
    for number, member in enumerate(members):
        assert any("blocks=0/1" in scheme for scheme in member["allocation"].values())
        reloads_as_claimed(cli, out, member, tmp_path / f"exported{number}")
    finalized = cli("finalize", out, member["id"][:12])
    assert finalized.status == 0, finalized.err
