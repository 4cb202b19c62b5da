"""Which experts of a mixture take one option."""

from dataclasses import replace

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


def space_of(tmp_path, ties, choices, routed=ROUTED, layers=None):
    path = tmp_path / "mine.yaml"
    path.write_text(f"schema_version: 1\nname: mine\ndescription: A test.\n{ties}{choices}")
    return load_space(str(path), layers or experts(), routed=routed)


def groups(tmp_path, ties="", routed=ROUTED, choices=CHOICES):
    space = space_of(tmp_path, ties, choices, routed)
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


def options_by_choice(space):
    return {
        choice.name.removeprefix("model.layers.0.mlp.experts."): [o.label for o in choice.options]
        for choice in space.choices
    }


MERGING = "choices:\n  - roles: [gate_up, down]\n    options: [base, merged+rtn(bits=4)]\n"
DROPPING = "choices:\n  - roles: [gate_up, down]\n    options: [base, drop]\n"
WHOLE = "ties: {expert_groups: 4, whole_experts: true}\n"


def test_all_layers_of_an_expert_take_one_option_if_asked(tmp_path):
    found = groups(tmp_path, "ties: {expert_groups: 2, whole_experts: true}\n")
    assert found == [
        "{gate_up_proj.0,gate_up_proj.2,down_proj.0,down_proj.2}",
        "{gate_up_proj.1,gate_up_proj.3,down_proj.1,down_proj.3}",
    ]
    choices = CHOICES.replace("[gate_up, down]", "[gate_up]") + CHOICES[9:].replace(
        "[gate_up, down]", "[down]"
    )
    with pytest.raises(SpaceError, match=r"all layers of an expert.*\{whole_experts: false\}"):
        groups(tmp_path, WHOLE, choices=choices)


@pytest.mark.parametrize("whole", ["", ", whole_experts: true"])
def test_experts_of_one_part_are_merged(tmp_path, whole):
    space = space_of(tmp_path, f"ties: {{expert_groups: 2{whole}}}\n", MERGING)
    for choice in space.choices:
        merged = choice.options[0]
        for layer, scheme in zip(choice.layers, merged.schemes, strict=True):
            pair = "0/2" if layer[-1] in "02" else "1/3"
            assert str(scheme).startswith(f"merged(experts={pair},to=mean)+rtn(")
        assert merged.storage_bytes * 14 < choice.base_bytes  # half of four bits
    assert space.n_dropped == 0


def test_an_expert_by_itself_cannot_be_merged(tmp_path):
    found = space_of(tmp_path, "ties: {expert_groups: 4}\n", MERGING)
    assert found.n_dropped == 8
    assert set(map(tuple, options_by_choice(found).values())) == {("base",)}
    with pytest.raises(SpaceError, match=r"expert_groups is 0.*N below the number .* is 4"):
        space_of(tmp_path, "ties: {expert_groups: 0}\n", MERGING)
    written = MERGING.replace("merged+rtn(bits=4)", "merged(experts=0/1)")
    with pytest.raises(SpaceError, match=r"expert_groups says which experts share"):
        space_of(tmp_path, "ties: {expert_groups: 2}\n", written)


def test_a_layer_that_is_no_expert_loses_the_option_to_merge(tmp_path):
    plain = [replace(layer, expert=None) for layer in experts()]
    found = space_of(tmp_path, "", MERGING, layers=plain)
    assert {len(choice.options) for choice in found.choices} == {1}


def test_only_parts_beyond_those_that_each_token_needs_are_dropped(tmp_path):
    """Expert 2 is used most, then 0: a token is sent to two, so 3 and 1 may go."""
    space = space_of(tmp_path, WHOLE, DROPPING)
    assert options_by_choice(space) == {
        "{gate_up_proj.0,down_proj.0}": ["base"],
        "{gate_up_proj.1,down_proj.1}": ["drop", "base"],
        "{gate_up_proj.2,down_proj.2}": ["base"],
        "{gate_up_proj.3,down_proj.3}": ["drop", "base"],
    }
    assert space.n_dropped == 2
    dropped = [c.options[0] for c in space.choices if len(c.options) == 2]
    assert {option.storage_bytes for option in dropped} == {0}


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ("ties: {expert_groups: 4}\n", r"with all of its layers.*\{whole_experts: true\}"),
        ("ties: {whole_experts: true}\n", r"hold the 2 experts .* Write `ties: \{expert_groups: 4"),
    ],
)
def test_dropping_parts_of_an_expert_or_too_many_experts_is_refused(tmp_path, ties, message):
    with pytest.raises(SpaceError, match=message):
        space_of(tmp_path, ties, DROPPING)


def test_routers_stay_as_they_are_unless_a_space_names_them(tmp_path):
    name = "model.layers.0.mlp.gate"
    router = LayerSpec(name, "router", 0, 4, 64, "linear", "float32", name, 256)

    def searched(selector):
        choices = f"choices:\n  - {selector}\n    options: [base, rtn(bits=4)]\n"
        found = space_of(tmp_path, "", choices, layers=[router, *experts()])
        return name in found.searched_layers

    assert not searched("blocks: [0]")
    assert not searched("layers: ['*']")
    assert not searched("layers: ['*.mlp.*']")
    assert searched("layers: ['*.mlp.*', '*.mlp.gate']")
    assert searched("roles: [router, down]")
    assert searched("roles: [router]\n    blocks: [0]")
