"""Parts of blocks dropped, from a space file to members that reload."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from .conftest import SMALL, reloads_as_claimed, spread

SPACE = """
schema_version: 1
name: parts
description: Parts dropped, or rounded.
ties: {sublayers: true}
choices:
  - roles: [query, key, value, output, gate, up, down]
    options: [drop, rtn(bits=4)]
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_members_without_some_parts_reload_and_a_dropped_block_leaves_the_dense_model(
    trained, cli, tmp_path
):
    (tmp_path / "parts.yaml").write_text(SPACE)
    out = tmp_path / "run"
    searched = cli(
        "search", trained("llama"), "--space", tmp_path / "parts.yaml", "--sampler", "random",
        "--budget", "12 trials", "--no-finalize", "--out", out, *SMALL,
    )  # fmt: skip
    assert searched.status == 0, searched.err
    front = json.loads((out / "front.json").read_text())
    dropping = spread([m for m in front["members"] if "drop" in m["allocation"].values()])
    for number, member in enumerate(dropping):
        reloads_as_claimed(cli, out, member, tmp_path / f"exported{number}")
    n_blocks = AutoModelForCausalLM.from_pretrained(trained("llama")).config.num_hidden_layers
    blocks_gone = []
    for number, member in enumerate(dropping):
        dense = tmp_path / f"dense{number}"
        written = cli("export", out, member["id"][:12], "--format", "dense", "--out", dense)
        assert written.status == 0, written.err
        gone = sum(
            all(
                scheme == "drop"
                for name, scheme in member["allocation"].items()
                if f".layers.{block}." in name
            )
            for block in range(n_blocks)
        )
        config = json.loads((dense / "config.json").read_text())
        assert config["num_hidden_layers"] == max(1, n_blocks - gone)
        blocks_gone.append(gone)
    assert max(blocks_gone) > 0
