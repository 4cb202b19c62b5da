from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core.errors import DataError
from autocompress.evaluate.splits import (
    Split,
    content_keys,
    count_tokens,
    make_splits,
)

BUDGETS = {"calibration_tokens": 40, "search_tokens": 20, "report_tokens": 30}


def text(*ids: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(ids), "pad_token_id": torch.tensor(0)}


def corpus(n: int, length: int = 5) -> list[dict[str, torch.Tensor]]:
    return [text(*range(i, i + length)) for i in range(n)]


examples = st.lists(
    st.lists(st.integers(1, 4), min_size=1, max_size=6).map(lambda ids: text(*ids)), max_size=120
)


@settings(deadline=None)
@given(examples, st.integers(0, 100), st.tuples(*[st.integers(1, 60)] * 3))
def test_no_content_is_in_two_splits_and_each_meets_its_budget(given_examples, seed, budgets):
    calibration, search, report = budgets
    try:
        splits = make_splits(
            given_examples,
            calibration_tokens=calibration,
            search_tokens=search,
            report_tokens=report,
            seed=seed,
        )
    except DataError:
        unique = {next(iter(content_keys(e))): e for e in given_examples}
        available = sum(map(count_tokens, unique.values()))
        # it may only fail if the last sequence of each split could eat what is missing
        assert available < sum(budgets) + 3 * 6 * 2
        return
    parts = [splits.calibration, splits.search, splits.report]
    keys = [key for part in parts for e in part.examples for key in content_keys(e)]
    assert len(keys) == len(set(keys))
    for part, budget in zip(parts, budgets, strict=True):
        assert part.n_tokens == sum(map(count_tokens, part.examples)) >= budget
        assert len(part) >= 2


def test_pairs_that_share_a_passage_are_duplicates():
    shared = torch.tensor([9, 9, 9])
    pairs = [{"input_ids": torch.tensor([i, i]), "positive_input_ids": shared} for i in range(50)]
    others = [
        {"input_ids": torch.tensor([i]), "positive_input_ids": torch.tensor([i, i + 1])}
        for i in range(100, 140)
    ]
    splits = make_splits(
        [*pairs, *others], calibration_tokens=20, search_tokens=20, report_tokens=20, seed=0
    )
    everything = [*splits.calibration.examples, *splits.search.examples, *splits.report.examples]
    assert sum(torch.equal(e["positive_input_ids"], shared) for e in everything) <= 1


def test_the_same_seed_deals_the_same_sequences_and_another_deals_others():
    one, again = (
        make_splits(corpus(60), **BUDGETS, seed=1),
        make_splits(corpus(60), **BUDGETS, seed=1),
    )
    other = make_splits(corpus(60), **BUDGETS, seed=2)
    assert one.digest == again.digest
    assert one.digest != other.digest


def test_asking_for_more_search_tokens_leaves_the_report_tokens_alone():
    few = make_splits(corpus(60), **BUDGETS, seed=1)
    many = make_splits(corpus(60), **{**BUDGETS, "search_tokens": 100}, seed=1)
    assert few.report.digest == many.report.digest


def test_too_little_data_says_how_much_there_is_and_what_to_lower():
    with pytest.raises(DataError) as caught:
        make_splits([*corpus(10), *corpus(10)], **BUDGETS, seed=0)
    message = str(caught.value)
    assert "90 tokens are needed" in message
    assert "50 tokens in 10 different sequences" in message
    assert "10 duplicates were dropped" in message
    assert "--sequence-length" in message


def test_the_numbers_that_the_error_suggests_do_fit():
    with pytest.raises(DataError) as caught:
        make_splits(
            corpus(100), calibration_tokens=9000, search_tokens=700, report_tokens=800, seed=0
        )
    suggested = {
        f"{name}_tokens": int(value)
        for name, value in re.findall(
            r"--(calibration|search|report)-tokens (\d+)", str(caught.value)
        )
    }
    assert len(suggested) == 3
    make_splits(corpus(100), **suggested, seed=0)


def test_no_data_at_all_is_too_little():
    with pytest.raises(DataError, match="0 tokens in 0 different sequences"):
        make_splits([], **BUDGETS, seed=0)


def test_a_split_of_no_tokens_is_refused_by_the_option_that_asks_for_it():
    with pytest.raises(DataError, match="--search-tokens must be at least 1, but got 0"):
        make_splits(corpus(60), **{**BUDGETS, "search_tokens": 0}, seed=0)


def test_the_digest_depends_on_content_and_order_alone():
    a, b = text(1, 2), text(3)
    assert Split.of("search", [a, b]).digest == Split.of("report", [a, b]).digest
    assert Split.of("search", [a, b]).digest != Split.of("search", [b, a]).digest
    assert Split.of("x", [a]).digest != Split.of("x", [{**a, "labels": torch.tensor(1)}]).digest


def test_stated_token_numbers_count_before_ids():
    assert count_tokens({"pixel_values": torch.zeros(3, 8, 8), "n_tokens": torch.tensor(17)}) == 17
    pair = {"input_ids": torch.zeros(4).long(), "positive_input_ids": torch.zeros(6).long()}
    assert count_tokens(pair) == 10
