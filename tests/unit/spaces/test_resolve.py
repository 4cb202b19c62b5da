"""What a space file comes to on a model: options, ratios, ties, baselines."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from autocompress.core import Allocation, LayerSpec, Scheme
from autocompress.core.errors import SpaceError
from autocompress.methods import canonical, footprint, require_whole
from autocompress.spaces.resolve import rank_for


def _linear(rows: int, columns: int) -> LayerSpec:
    return LayerSpec("x", "down", 0, rows, columns, "linear", "float32", "x", rows * columns)


def _labels(space, index: int = 0) -> list[str]:
    return [option.label for option in space.choices[index].options]


def test_a_grid_is_the_product_of_its_alternatives_with_none_as_absence(space_of):
    space = space_of(
        "- roles: [down]\n"
        "  options:\n"
        "  - factorize: [none, {method: svd, parameter_ratio: [0.5, 0.75]}]\n"
        "    sparsify: [none, {method: magnitude, sparsity: 0.5}]\n"
        "    quantize: [none, rtn(bits=8), {method: rtn, bits: [3, 4], group_size: 32}]\n"
    )
    assert len(space.choices[0].options) == 3 * 2 * 4
    assert {
        "base",
        "rtn(bits=8)",
        "svd(parameter_ratio=0.75)",
        "svd(parameter_ratio=0.5)+magnitude(sparsity=0.5)+rtn(bits=3,group_size=32)",
    } < set(_labels(space))


def test_options_are_sorted_by_stored_bytes_and_know_them(space_of, layers):
    space = space_of(
        "- roles: [query, key, value, down]\n"
        "  options: [base, rtn(bits=8), rtn(bits=2), magnitude(sparsity=0.5), rtn(bits=4)]\n"
    )
    by_name = {layer.name: layer for layer in layers}
    for choice in space.choices:
        sizes = [option.storage_bytes for option in choice.options]
        assert sizes == sorted(sizes)
        for option in choice.options:
            pairs = zip(choice.layers, option.schemes, strict=True)
            assert option.storage_bytes == sum(
                footprint(by_name[name], scheme).storage_bytes for name, scheme in pairs
            )
        base = next(option for option in choice.options if option.label == "base")
        assert base.storage_bytes == choice.base_bytes


def test_schemes_are_canonical_so_that_defaults_written_out_are_the_same_option(space_of):
    space = space_of(
        "- roles: [down]\n"
        '  options: ["rtn(bits=4)", "rtn(bits=4,group_size=128)", "rtn(bits=4,symmetric=true)"]\n'
    )
    assert _labels(space) == ["rtn(bits=4)"]
    assert space.choices[0].options[0].schemes == (canonical(Scheme.parse("rtn(bits=4)")),)
    assert space.n_merged == 2 * len(space.choices)


def test_rounding_that_stores_as_much_as_the_base_beside_it_is_left_out(space_of, layers):
    written = "- roles: [down]\n  options: [base, cast(dtype=float16), rtn(bits=8)]\n"
    assert _labels(space_of(written)) == ["rtn(bits=8)", "cast(dtype=float16)", "base"]
    short = [replace(layer, dtype="bfloat16") for layer in layers]
    space = space_of(written, model=short)
    assert _labels(space) == ["rtn(bits=8)", "base"]
    assert space.n_dropped == len(space.choices)
    alone = space_of(written.replace("base, ", ""), model=short)
    assert "cast(dtype=float16)" in _labels(alone)
    rounded = space_of("- roles: [down]\n  options: [base, int_inputs(bits=8)]\n", model=short)
    assert len(_labels(rounded)) == 2  # what is computed changes


def test_tied_layers_share_one_choice_and_each_gets_the_rank_of_its_own_shape(space_of):
    space = space_of("- roles: [query, key, value]\n  options: [base, svd(parameter_ratio=0.75)]\n")
    first = space.choices[0]
    assert first.name == "model.layers.0.self_attn.{q_proj,k_proj,v_proj}"
    ranks = [dict(scheme.stages[0].options)["rank"] for scheme in first.options[0].schemes]
    assert ranks == [24, 16, 16]  # 0.75 * 32 = 24 for 64 x 64; 0.75 * 21.3 = 16 for 32 x 64
    assert len(space.choices) == 2


def test_ties_can_be_switched_off(space_of):
    choices = "- roles: [query, key, value, gate, up]\n  options: [base, rtn(bits=4)]\n"
    assert len(space_of(choices).choices) == 4
    assert len(space_of(choices, "ties: {qkv: false}\n").choices) == 8
    assert len(space_of(choices, "ties: {qkv: false, gate_up: false}\n").choices) == 10


def test_cross_attention_ties_key_and_value_of_each_block_though_all_blocks_read_one_input(
    space_of,
):
    def cross(block: int, part: str) -> LayerSpec:
        reads = "decoder.0.cross_key" if part != "query" else f"decoder.{block}.cross_query"
        return LayerSpec(
            f"decoder.{block}.cross_{part}", f"cross_{part}", block, 64, 64, "linear", "float32",
            reads, 4096,
        )  # fmt: skip

    model = [cross(block, part) for block in (0, 1) for part in ("query", "key", "value")]
    space = space_of(
        "- roles: [cross_query, cross_key, cross_value]\n  options: [base]\n", model=model
    )
    assert [choice.name for choice in space.choices] == [
        "decoder.0.cross_query",
        "decoder.0.{cross_key,cross_value}",
        "decoder.1.cross_query",
        "decoder.1.{cross_key,cross_value}",
    ]


@pytest.mark.parametrize(
    ("ratio", "shape", "rank"),
    [
        (0.5, (64, 64), 16),  # exactly half of break-even 32
        (0.6, (64, 64), 16),  # 19.2, down to a multiple of 8
        (0.4, (64, 64), 12),  # below 16 only rounded down
        (0.5, (4096, 1024), 408),  # 409.6
        (0.5, (2, 64), None),  # 0.97: no rank at all
        (0.99, (2, 2), None),  # break-even 1
    ],
)
def test_a_parameter_ratio_becomes_a_rank_below_break_even(ratio, shape, rank):
    assert rank_for(ratio, _linear(*shape)) == rank


@pytest.mark.parametrize("shape", [(64, 64), (30, 500), (7, 9), (1024, 4096)])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.77, 0.99])
def test_factors_never_hold_more_than_the_ratio_asks_for(ratio, shape):
    layer = _linear(*shape)
    rank = rank_for(ratio, layer)
    if rank is not None:
        assert rank * sum(shape) <= ratio * layer.n_weights < layer.n_weights


def test_a_ratio_without_a_useful_rank_is_dropped_counted_and_logged(space_of, caplog):
    tiny = [_linear(4, 4), LayerSpec("y", "up", 0, 64, 64, "linear", "float32", "y", 4096)]
    with caplog.at_level(logging.DEBUG, logger="autocompress.spaces.resolve"):
        space = space_of(
            "- roles: [up, down]\n  options: [base, svd(parameter_ratio=0.4)]\n", model=tiny
        )
    assert [len(choice.options) for choice in space.choices] == [1, 2]
    assert space.n_dropped == 1
    assert "svd(parameter_ratio=0.4) has no useful rank" in caplog.text


def test_a_choice_that_loses_all_its_options_is_an_error(space_of):
    with pytest.raises(SpaceError, match=r"mine\.yaml:6: choices\[0\].*Add the option base"):
        space_of("- roles: [down]\n  options: [svd(parameter_ratio=0.4)]\n", model=[_linear(4, 4)])


def test_a_layer_belongs_to_the_first_choice_that_selects_it(space_of):
    space = space_of(
        "- roles: [down]\n  blocks: [-1]\n  options: [base]\n"
        "- roles: [down, output]\n  options: [base, rtn(bits=4)]\n"
    )
    options = {choice.name: len(choice.options) for choice in space.choices}
    assert options == {
        "model.layers.0.self_attn.o_proj": 2,
        "model.layers.0.mlp.down_proj": 2,
        "model.layers.1.self_attn.o_proj": 2,
        "model.layers.1.mlp.down_proj": 1,
    }


def test_a_pattern_also_matches_the_name_of_a_tied_module(space_of):
    space = space_of('- layers: ["lm_head"]\n  options: [base, rtn(bits=8)]\n')
    assert space.searched_layers == ("model.embed_tokens",)


def test_choices_come_in_execution_order_whatever_the_order_of_the_file(space_of):
    space = space_of(
        "- roles: [down]\n  options: [base]\n- roles: [embedding, output]\n  options: [base]\n"
    )
    assert [name.rpartition(".")[2] for name in space.searched_layers] == [
        "embed_tokens", "o_proj", "down_proj", "o_proj", "down_proj",
    ]  # fmt: skip


def test_uniform_baselines_take_the_nearest_wider_option_and_else_the_base(space_of):
    space = space_of(
        "- roles: [down]\n  options: [base, rtn(bits=3), rtn(bits=8)]\n"
        "- roles: [output]\n  options: [base, rtn(bits=4)]\n"
        "- roles: [embedding]\n  options: [base, magnitude(sparsity=0.5)]\n"
    )
    bits = {
        name: {layer: dict(s.stages[0].options)["bits"] for layer, s in allocation.items()}
        for name, allocation in space.baselines()
    }
    down = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    output = ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj")
    assert bits == {
        "uniform-8bit": dict.fromkeys(down, 8),  # output has nothing that wide: base
        "uniform-4bit": {**dict.fromkeys(down, 8), **dict.fromkeys(output, 4)},
        "uniform-3bit": {**dict.fromkeys(down, 3), **dict.fromkeys(output, 4)},
    }
    assert list(bits) == ["uniform-8bit", "uniform-4bit", "uniform-3bit"]


def test_a_transform_that_half_of_the_layers_offer_makes_baselines_of_its_own(space_of):
    space = space_of(
        "- roles: [query, key, value, output, gate, up]\n"
        "  options:\n"
        "    - base\n"
        "    - quantize: [{method: rtn, bits: [3, 4]}]\n"
        "    - transform: [hadamard]\n"
        "      quantize: [{method: rtn, bits: [3, 5]}]\n"
        "- roles: [down]\n"
        "  options: [rtn(bits=8), rtn(bits=4), awq+rtn(bits=3)]\n"
    )
    named = dict(space.baselines())
    assert list(named) == [
        "uniform-8bit", "uniform-5bit-hadamard", "uniform-4bit", "uniform-3bit",
        "uniform-3bit-hadamard",
    ]  # fmt: skip
    harshest = named["uniform-3bit-hadamard"]
    for name, scheme in harshest.items():
        methods = [stage.method for stage in scheme.stages]
        assert methods == (["rtn"] if "down" in name else ["hadamard", "rtn"])
        assert dict(scheme.stages[-1].options)["bits"] == (4 if "down" in name else 3)


def test_of_several_options_of_one_width_the_baseline_takes_the_dearest(space_of):
    space = space_of(
        "- roles: [down]\n"
        '  options: ["rtn(bits=4,group_size=128)", "rtn(bits=4,group_size=16)", "svd(rank=2)"]\n'
    )
    ((_, allocation),) = space.baselines()
    assert {dict(s.stages[0].options)["group_size"] for s in allocation.values()} == {16}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            "base, magnitude(sparsity=0.25), magnitude(sparsity=0.5)",
            ["uniform-25%-sparse", "uniform-50%-sparse"],
        ),
        (
            "base, svd(parameter_ratio=0.5), svd(parameter_ratio=0.75)",
            ["uniform-75%-rank", "uniform-50%-rank"],
        ),
        (
            "base, svd(parameter_ratio=0.5)+rtn(bits=8)",
            ["uniform-svd(parameter_ratio=0.5)+rtn(bits=8)"],
        ),
    ],
)
def test_without_quantize_only_options_baselines_are_uniform_at_each_level(
    space_of, options, names
):
    space = space_of(f"- roles: [down, query, key, value]\n  options: [{options}]\n")
    assert [name for name, _ in space.baselines()] == names
    assert all(allocation in space for _, allocation in space.baselines())


def test_the_base_model_is_no_baseline_and_no_allocation_is_one_twice(space_of):
    space = space_of(
        "- roles: [down]\n  options: [base]\n- roles: [output]\n  options: [rtn(bits=4)]\n"
    )
    assert [name for name, _ in space.baselines()] == ["uniform-4bit"]
    assert space_of("- roles: [down]\n  options: [base]\n").baselines() == ()


def test_the_summary_counts_what_the_space_offers(space_of, layers):
    space = space_of(
        "- roles: [query, key, value, gate, up, down]\n"
        "  options: [base, rtn(bits=4), rtn(bits=8)]\n"
    )
    summary = space.summary()
    searched = [layer for layer in layers if layer.name in space.searched_layers]
    four_bit = canonical(Scheme.parse("rtn(bits=4)"))
    assert summary["n_layers"] == 12
    assert summary["n_choices"] == 6
    assert summary["combinations"] == "729"
    assert summary["base_bytes"] == sum(layer.base_bytes for layer in searched)
    assert summary["smallest_bytes"] == sum(
        footprint(layer, four_bit).storage_bytes for layer in searched
    )
    assert summary["options"] == {"rtn(bits=4)": 6, "rtn(bits=8)": 6, "base": 6}


def test_levels_that_name_no_choice_or_are_out_of_range_are_refused(space_of):
    space = space_of("- roles: [down]\n  options: [base, rtn(bits=4)]\n")
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(SpaceError, match="needs a level for each of its 2 choices, but 1 are miss"):
        space.decode({name: 0})
    with pytest.raises(SpaceError, match=r"Did you mean 'model\.layers\.0\.mlp\.down_proj'"):
        space.decode({"model.layers.0.mlp.down": 0, name: 0})
    for level in (2, -1):
        with pytest.raises(SpaceError, match="levels 0 to 1"):
            space.decode({choice.name: level for choice in space.choices})


def test_an_allocation_outside_the_space_is_not_in_it_and_encode_says_why(space_of):
    space = space_of("- roles: [down]\n  options: [base, rtn(bits=4)]\n")
    five = Allocation.of({space.searched_layers[0]: canonical(Scheme.parse("rtn(bits=5)"))})
    other = Allocation.of({"model.embed_tokens": canonical(Scheme.parse("rtn(bits=4)"))})
    assert five not in space
    assert other not in space
    assert "base" not in space
    with pytest.raises(SpaceError, match="does not offer 'rtn"):
        space.encode(five)
    with pytest.raises(SpaceError, match=r"searched layers only.*model\.embed_tokens"):
        space.encode(other)


SPANNED = (
    "- roles: [query, key, value, up]\n"
    "  span: 2\n"
    "  options: [base, rtn(bits=4), basis_sharing(parameter_ratio=0.5)+rtn(bits=8)]\n"
)


def test_a_span_joins_what_does_the_same_in_adjacent_blocks(space_of, blocks):
    space = space_of(SPANNED, model=blocks(5))
    assert [choice.name for choice in space.choices] == [
        "model.layers.{0,1}.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.{0,1}.mlp.up_proj",
        "model.layers.{2,3}.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.{2,3}.mlp.up_proj",
        "model.layers.4.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.4.mlp.up_proj",
    ]
    assert [len(choice.options) for choice in space.choices] == [3, 3, 3, 3, 2, 2]
    assert space.n_dropped == 2  # the last block has no neighbour left to share with
    assert space.choices[0].layers[3] == "model.layers.1.self_attn.q_proj"


def test_layers_that_share_get_the_rank_of_the_stack_and_store_the_basis_once(space_of, blocks):
    space = space_of(SPANNED, model=blocks(2))
    by_name = {layer.name: layer for layer in blocks(2)}
    for choice in space.choices:
        option = next(o for o in choice.options if "basis" in o.label)
        schemes = dict(zip(choice.layers, option.schemes, strict=True))
        for name, scheme in schemes.items():
            stage = dict(scheme.stages[0].options)
            assert stage["blocks"] == "0/1"
            layer = by_name[name]
            assert stage["rank"] == rank_for(0.5, layer, 2)
            stacked = 2 * layer.out_features * layer.in_features
            kept = stage["rank"] * (2 * layer.out_features + layer.in_features)
            assert kept <= 0.5 * stacked
        assert option.storage_bytes == sum(
            footprint(by_name[name], scheme).storage_bytes for name, scheme in schemes.items()
        )
        allocation = space.decode(
            {c.name: c.options.index(option) for c in [choice]}
            | {c.name: 0 for c in space.choices if c is not choice}
        )
        require_whole(allocation)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("  options: [basis_sharing(parameter_ratio=0.5)]\n", "got span 1. Write `span: 2`"),
        ("  span: 2\n  options: ['basis_sharing(rank=4,blocks=0/1)']\n", "Leave blocks out"),
        ("  span: 0\n  options: [base]\n", "greater than or equal to 1"),
        ("  span: 2\n  options: [hadamard+basis_sharing(rank=4)]\n", "hadamard gives each layer"),
        ("  span: 2\n  options: [basis_sharing(rank=99)]\n", "nearest legal value"),
    ],
)
def test_sharing_that_cannot_be_is_refused_before_a_search(space_of, choice, message):
    with pytest.raises(SpaceError, match=message):
        space_of(f"- roles: [up]\n{choice}")
