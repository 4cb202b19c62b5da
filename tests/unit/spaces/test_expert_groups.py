"""Which experts of a mixture take one option."""

import pytest

from autocompress.core import ExpertOf, LayerSpec
from autocompress.core.errors import SpaceError
from autocompress.spaces import load_space

CHOICES = "choices:\n  - roles: [gate_up, down]\n    options: [base, 'rtn(bits=4)']\n"
# Expert 2 is used most, then 0, 3, 1.
USED = {0: 50, 1: 3, 2: 80, 3: 40}


def experts(n=4):
    def layer(part, role, rows, columns, index):
        name = f"model.layers.0.mlp.experts.{part}.{index}"
        macs = rows * columns // 2
        expert = ExpertOf(index, n, n // 2)
        return LayerSpec(
            name, role, 0, rows, columns, "linear", "float32", name, macs, expert=expert
        )

    return [
        *(layer("gate_up_proj", "gate_up", 96, 64, i) for i in range(n)),
        *(layer("down_proj", "down", 64, 48, i) for i in range(n)),
    ]


ROUTED = {layer.name: USED[layer.expert.index] for layer in experts()}


def groups(tmp_path, ties="", routed=ROUTED, choices=CHOICES):
    path = tmp_path / "mine.yaml"
    path.write_text(f"schema_version: 1\nname: mine\ndescription: A test.\n{ties}{choices}")
    space = load_space(str(path), experts(), routed=routed)
    return [choice.name.removeprefix("model.layers.0.mlp.experts.") for choice in space.choices]


def test_all_experts_of_a_block_are_one_part_by_default(tmp_path):
    assert groups(tmp_path) == ["gate_up_proj.{0,1,2,3}", "down_proj.{0,1,2,3}"]


def test_parts_hold_experts_that_are_used_alike(tmp_path):
    found = groups(tmp_path, "ties: {expert_groups: 2}\n")
    assert found == [f"{p}.{{{e}}}" for p in ("gate_up_proj", "down_proj") for e in ("0,2", "1,3")]


def test_without_counts_or_by_index_neighbours_form_a_part(tmp_path):
    expected = [f"{p}.{{{e}}}" for p in ("gate_up_proj", "down_proj") for e in ("0,1", "2,3")]
    assert groups(tmp_path, "ties: {expert_groups: 2}\n", {}) == expected
    assert groups(tmp_path, "ties: {expert_groups: 2, experts_by: index}\n") == expected


@pytest.mark.parametrize("n", [0, 4, 9])
def test_every_expert_for_itself(tmp_path, n):
    found = groups(tmp_path, f"ties: {{expert_groups: {n}}}\n")
    assert found == [f"{p}.{e}" for p in ("gate_up_proj", "down_proj") for e in range(4)]


def test_parts_may_differ_in_size_by_one(tmp_path):
    found = groups(tmp_path, "ties: {expert_groups: 3}\n")
    assert sorted(name.count(",") + 1 for name in found[:3]) == [1, 1, 2]


def test_a_part_in_two_choices_is_refused_with_the_switch(tmp_path):
    choices = (
        "choices:\n  - layers: ['*.experts.down_proj.0']\n    options: [base]\n"
        "  - roles: [gate_up, down]\n    options: [base, 'rtn(bits=4)']\n"
    )
    with pytest.raises(SpaceError, match=r"experts of one part.*ties: \{expert_groups: 0\}"):
        groups(tmp_path, choices=choices)
    assert len(groups(tmp_path, "ties: {expert_groups: 0}\n", choices=choices)) == 8


def test_groups_are_a_whole_number(tmp_path):
    with pytest.raises(SpaceError, match="expert_groups"):
        groups(tmp_path, "ties: {expert_groups: -1}\n")
    with pytest.raises(SpaceError, match="experts_by"):
        groups(tmp_path, "ties: {experts_by: size}\n")
