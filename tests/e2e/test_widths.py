"""Parts of blocks with fewer heads and neurons, from a space file to members that reload."""

from __future__ import annotations

import json

import pytest

from .conftest import SMALL, reloads_as_claimed, spread

SPACE = """
schema_version: 1
name: narrow
description: Fewer heads and neurons.
ties: {sublayers: true}
choices:
  - roles: [query, key, value, output, gate, up, down]
    options:
      - rtn(bits=8)
      - width: [{method: wanda_sp, keep_ratio: [0.5, 0.75]}]
        quantize: [none, {method: gptq, bits: 4, group_size: 32}]
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_narrower_members_are_finalized_and_reload_as_claimed(trained, cli, tmp_path):
    (tmp_path / "narrow.yaml").write_text(SPACE)
    out = tmp_path / "run"
    searched = cli(
        "search", trained("llama"), "--space", tmp_path / "narrow.yaml",
        "--budget", "16 trials", "--no-finalize", "--out", out, *SMALL,
    )  # fmt: skip
    assert searched.status == 0, searched.err
    front = json.loads((out / "front.json").read_text())
    narrow = spread([m for m in front["members"] if "keep=" in str(m["allocation"])])
    for number, member in enumerate(narrow):
        reloads_as_claimed(cli, out, member, tmp_path / f"exported{number}")
    finalized = cli("finalize", out, narrow[0]["id"][:12])
    assert finalized.status == 0, finalized.err
