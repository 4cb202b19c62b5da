from __future__ import annotations

import math

import pytest
from front_examples import make_document, make_member

from autocompress.core.errors import NoAnswerError, UnknownNameError, UsageError
from autocompress.fronts import find_member, parse_bytes, pick


@pytest.mark.parametrize(
    ("by", "chosen"), [("cost-efficiency", "b"), ("quality", "d"), ("size", "a"), ("knee", "b")]
)
def test_each_rule_picks_its_best_member(document, by, chosen):
    assert pick(document, by=by).id[0] == chosen


@pytest.mark.parametrize(
    ("constraints", "chosen"),
    [
        ({"min_quality": 0.97}, "c"),
        ({"min_quality": 0.5}, "a"),
        ({"max_bytes": 30_000_000, "by": "quality"}, "c"),
        ({"max_latency_ms": 0.69, "by": "quality"}, "b"),
        ({"min_quality": 0.96, "by": "size"}, "c"),
        ({"min_quality": 0.96, "max_bytes": 60_000_000, "max_latency_ms": 1.0, "by": "knee"}, "d"),
    ],
)
def test_constraints_come_before_the_rule_and_include_their_limit(document, constraints, chosen):
    assert pick(document, **constraints).id[0] == chosen


def test_a_broken_model_never_wins_by_cost_efficiency_unless_asked_for(document):
    assert max(document.members, key=lambda m: m.cost_efficiency).id[0] == "a"
    assert pick(document).id[0] == "b"
    assert pick(document, min_quality=0.0).id[0] == "a"
    assert pick(document, by="size").id[0] == "a"


def test_ties_go_to_the_higher_quality_then_to_fewer_bytes():
    document = make_document(
        [make_member("x", 10, 0.9, 5.0), make_member("y", 20, 0.95, 5.0)], floor=0.5
    )
    assert pick(document).id[0] == "y"


def test_the_message_says_what_each_constraint_rules_out_and_who_came_nearest(document):
    with pytest.raises(NoAnswerError) as caught:
        pick(document, min_quality=0.98, max_bytes=55_000_000)
    message = str(caught.value)
    assert "--min-quality 0.98 rules out 3 of 4 (best is 0.99)" in message
    assert "--max-bytes 55MB rules out 1 of 4 (best is 10MB)" in message
    assert "The nearest, c0000000, retains 0.97 at 30MB and 0.7 ms per token" in message
    assert "relax --min-quality" in message
    assert caught.value.exit_status == 1


def test_the_floor_is_named_when_it_is_what_rules_out():
    document = make_document([make_member("a", 10, 0.55)], floor=0.9)
    with pytest.raises(NoAnswerError, match=r"--min-quality 0\.9 \(the floor of cost efficiency\)"):
        pick(document)


def test_the_nearest_member_says_where_its_latency_is_from():
    document = make_document([make_member("a", 10, 0.95, latency=7.0)])
    with pytest.raises(NoAnswerError, match=r"7 ms per token \(analytic \(roofline of x\)\)"):
        pick(document, max_latency_ms=5.0)


def test_members_without_latency_do_not_fit_a_limit_on_it():
    document = make_document([make_member("a", 10, 0.95, latency=math.nan)])
    with pytest.raises(NoAnswerError, match=r"rules out 1 of 1 \(none has it\)"):
        pick(document, max_latency_ms=5.0)


def test_an_empty_front_has_no_answer():
    with pytest.raises(NoAnswerError, match="The front has no members"):
        pick(make_document([]))


def test_a_member_without_a_score_is_not_picked_by_it():
    document = make_document([make_member("a", 10, 0.95, math.nan)])
    with pytest.raises(NoAnswerError, match="has a cost efficiency"):
        pick(document)
    assert pick(document, by="quality").id[0] == "a"


@pytest.mark.parametrize(
    ("percent", "hint"),
    [(97, r"Did you mean 0\.97\?"), (100, r"Did you mean 1\?"), (970, r"For example: 0\.97")],
)
def test_a_quality_in_percent_is_answered_with_the_share(document, percent, hint):
    with pytest.raises(UsageError, match=rf"got --min-quality {percent}\. {hint}"):
        pick(document, min_quality=percent)


def test_a_quality_above_that_of_the_base_may_be_asked_for(document):
    with pytest.raises(NoAnswerError, match=r"--min-quality 1\.4 rules out 4 of 4"):
        pick(document, min_quality=1.4)


def test_an_unknown_rule_is_answered_with_the_nearest(document):
    with pytest.raises(UsageError, match="Did you mean 'quality'"):
        pick(document, by="qualty")


def test_a_member_is_found_by_id_by_its_start_or_by_the_name_of_a_baseline(document):
    assert find_member(document, "b00000000").id == "b00000000"
    assert find_member(document, "d0").id == "d00000000"
    assert find_member(document, "uniform-4bit").storage_bytes == 31_000_000


def test_the_full_id_wins_over_a_longer_one_that_starts_alike():
    document = make_document([make_member("a", 10, 0.9), make_member("a000000001", 20, 0.95)])
    assert find_member(document, "a00000000").storage_bytes == 10_000_000
    with pytest.raises(UnknownNameError, match="start of 2 ids"):
        find_member(document, "a0000")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("uniform-4bits", "Did you mean 'uniform-4bit'"), ("zz", "Available: "), ("", "Available: ")],
)
def test_an_unknown_member_is_answered_with_the_nearest(document, name, hint):
    with pytest.raises(UnknownNameError, match=hint):
        find_member(document, name)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("60MB", 60_000_000), ("60 mb", 60_000_000), ("1.5GiB", 1_610_612_736),
        (60_000_000, 60_000_000), ("60000000", 60_000_000), ("6e7", 60_000_000),
        ("0.1GB", 100_000_000), ("1kB", 1000), ("1KiB", 1024), (" 12 b ", 12), (2.5, 2),
        ("1.1GB", 1_100_000_000),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "MB", "sixty", "60XB", "-1MB", "0", "0.4", "1.2.3MB", "nan", "inf", "60MB!",
     math.nan, math.inf, True, "60 000 000"],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="Example: 60MB"):
        parse_bytes(text)


def test_a_bare_letter_is_refused_since_it_may_mean_either_unit():
    with pytest.raises(UsageError, match="60M may mean 60MB or 60MiB"):
        parse_bytes("60M")
