"""Parts of a block that take one option, so that they can be dropped as a whole."""

from __future__ import annotations

import pytest

from autocompress.core.errors import SpaceError
from autocompress.methods import drops

TIES = "ties: {sublayers: true}\n"
PARTS = """
  - roles: [query, key, value, output]
    options: [base, drop]
  - roles: [gate, up, down]
    options: ["rtn(bits=4)", drop]
"""


def test_attention_and_feed_forward_take_one_option_each(space_of):
    found = space_of(PARTS, TIES)
    assert [choice.name for choice in found.choices] == [
        f"model.layers.{n}.{part}"
        for n in (0, 1)
        for part in (
            "self_attn.{q_proj,k_proj,v_proj,o_proj}",
            "mlp.{gate_proj,up_proj,down_proj}",
        )
    ]
    first = found.choices[0]
    assert [option.label for option in first.options] == ["drop", "base"]
    assert first.options[0].storage_bytes == 0
    assert all(map(drops, first.options[0].schemes))


def test_a_part_in_two_choices_is_refused_with_the_switch(space_of):
    choices = "\n  - roles: [query]\n    options: [base]\n" + PARTS.lstrip("\n")
    message = r"ties\.sublayers says that all layers of the attention of a block.*sublayers: false"
    with pytest.raises(SpaceError, match=message):
        space_of(choices, TIES)


def test_without_the_switch_fused_layers_alone_are_tied(space_of):
    names = [choice.name for choice in space_of(PARTS).choices]
    assert "model.layers.0.self_attn.o_proj" in names
    assert "model.layers.0.self_attn.{q_proj,k_proj,v_proj}" in names
