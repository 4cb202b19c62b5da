"""A front that is published again keeps what was finalized."""

from autocompress.core import Measurement, Resource
from autocompress.fronts import (
    BaseEntry,
    BudgetSpent,
    Finalized,
    FrontDocument,
    Member,
    MemberQuality,
    StudySummary,
)
from autocompress.workflows.publish import finalized_members, with_finalized


def member(name, n_bytes, retained, *, searched_as=None, baseline=""):
    bytes_ = {"storage_bytes": Resource(float(n_bytes), "bytes", "analytic")}
    zero = Measurement(0.0, 0.0)
    finalized = None
    if searched_as is not None:
        finalized = Finalized(
            searched_as, "s", "d", {"layer": "rtn(bits=4)"}, zero, zero, zero,
            block_steps=6, report_damages=(0.25, 1e-9),
        )  # fmt: skip
    return Member(
        name, 4.0, n_bytes, 100 / n_bytes, MemberQuality(retained, 0.0), bytes_, 1.0, {},
        name=baseline, finalized=finalized,
    )  # fmt: skip


def published(members):
    study = StudySummary("m", "causal-lm", "joint", "random", 0, BudgetSpent(1, 1.0, 1))
    resources = {"storage_bytes": Resource(100.0, "bytes", "analytic")}
    base = BaseEntry(100, MemberQuality(1.0, 0.0), resources)
    return FrontDocument.of(study, base, [m for m in members if m.name], members)


def ids(document):
    return [m.id for m in document.members]


SEARCHED = [member("small", 10, 0.5), member("large", 20, 0.9, baseline="uniform-4bit")]


def test_a_finalized_member_stays_in_the_place_of_what_it_was_made_of(tmp_path):
    # On the report tokens it is not the better one: the search tokens decided.
    rebuilt = member("rebuilt", 10, 0.49, searched_as="small")
    published([rebuilt, SEARCHED[1]]).write(tmp_path)
    kept = finalized_members(tmp_path)
    assert [m.id for m in kept] == ["rebuilt"]
    assert kept[0].finalized == rebuilt.finalized
    found = member("found", 15, 0.8)
    again = published(with_finalized([*SEARCHED, found], kept))
    assert ids(again) == ["rebuilt", "found", "large"]
    assert again.members[0].finalized.searched_as == "small"


def test_a_finalized_member_that_another_beats_goes():
    rebuilt = member("rebuilt", 10, 0.6, searched_as="small")
    better = member("better", 9, 0.7)
    assert ids(published(with_finalized([*SEARCHED, better], [rebuilt]))) == ["better", "large"]


def test_a_baseline_stays_what_the_search_is_compared_with():
    rebuilt = member("rebuilt", 20, 0.95, searched_as="large")
    members = with_finalized(SEARCHED, [rebuilt])
    again = published([*members, SEARCHED[1]])
    assert ids(again) == ["small", "rebuilt"]
    assert [b.id for b in again.baselines] == ["large"]


def test_a_front_that_is_damaged_or_not_there_holds_nothing_finalized(tmp_path):
    assert finalized_members(tmp_path) == ()
    (tmp_path / "front.json").write_text("{")
    assert finalized_members(tmp_path) == ()
