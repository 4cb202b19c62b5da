from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from front_examples import make_document, make_member

from autocompress.core import Measurement
from autocompress.fronts import (
    Comparison,
    Difference,
    FrontDocument,
    MemberQuality,
    Verdict,
    against_baselines,
    comparison_summary,
    paired,
    unpaired,
)

ERROR = 0.004 * math.sqrt(2)  # of a difference of two entries of `make_member`


def uniform(megabytes, retained, name="uniform-4bit"):
    return make_member(name, megabytes, retained, is_baseline=True)


def compare(members, baseline, differences=unpaired):
    (comparison,) = against_baselines(members, [baseline], differences)
    return comparison


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        (1.7 * ERROR, Verdict.BETTER),
        (1.6 * ERROR, Verdict.TIE),
        (-1.6 * ERROR, Verdict.TIE),
        (-1.7 * ERROR, Verdict.WORSE),
    ],
)
def test_a_difference_counts_from_1645_standard_errors(gap, verdict):
    comparison = compare([make_member("a", 20, 0.9 + gap)], uniform(21, 0.9))
    assert comparison.verdict is verdict
    assert comparison.difference.retained.value == pytest.approx(gap)
    assert comparison.difference.retained.standard_error == pytest.approx(ERROR)
    assert comparison.bytes_saved == 1_000_000


def test_the_rival_is_the_best_member_that_takes_no_more_bytes():
    members = [make_member("a", 10, 0.5), make_member("b", 20, 0.93), make_member("c", 21, 0.99)]
    comparison = compare(members, uniform(20, 0.9))
    assert comparison.member.startswith("b")
    assert (comparison.verdict, comparison.bytes_saved) == (Verdict.BETTER, 0)


def test_the_baseline_itself_counts_only_where_all_others_are_worse_or_too_large():
    baseline = uniform(20, 0.9)
    alone = compare([baseline, make_member("large", 21, 0.99)], baseline)
    worse = compare([make_member("small", 10, 0.5), baseline], baseline)
    for comparison in (alone, worse):
        assert (comparison.verdict, comparison.is_itself) == (Verdict.TIE, True)
        assert comparison.label == "tie (itself)"
        assert comparison.difference == Difference(Measurement(0.0, 0.0))
    tie = compare([make_member("small", 19, 0.899), baseline], baseline)
    assert (tie.member[:5], tie.label) == ("small", "tie")


def test_without_a_member_that_fits_there_is_no_verdict():
    comparison = compare([make_member("large", 21, 0.99)], uniform(20, 0.9))
    assert comparison == Comparison("uniform-4bit", Verdict.NONE)
    assert compare([make_member("a", 10, 0.9)], uniform(20, math.nan)).verdict is Verdict.NONE


def test_a_front_without_its_baseline_may_be_worse():
    assert compare([make_member("a", 10, 0.5)], uniform(20, 0.9)).label == "worse"


def test_paired_damages_see_what_independent_error_bars_hide():
    member, baseline = make_member("a", 20, 0.902), uniform(20, 0.9)
    of_sequences = [3.0, 1.0, 2.0, 5.0]
    damages = {baseline.id: of_sequences, member.id: [2.9, 0.8, 1.9, 4.8]}
    assert compare([member], baseline).verdict is Verdict.TIE
    comparison = compare([member], baseline, paired(damages))
    assert comparison.verdict is Verdict.BETTER
    # Gaps -0.1, -0.2, -0.1, -0.2: mean -0.15, standard deviation 0.1 / sqrt(3).
    damage = comparison.difference.damage
    assert damage.value == pytest.approx(-0.15)
    assert damage.standard_error == pytest.approx(0.1 / math.sqrt(3) / 2)


def test_damages_and_retained_quality_that_disagree_are_a_tie():
    member, baseline = make_member("a", 20, 0.95), uniform(20, 0.9)
    damages = {baseline.id: [1.0, 2.0, 3.0], member.id: [1.1, 2.2, 3.1]}
    comparison = compare([member], baseline, paired(damages))
    assert comparison.difference.damage.value > 0
    assert comparison.verdict is Verdict.TIE


@pytest.mark.parametrize("damages", [[], [1.0, 2.0], [1.0], [1.0, 2.0, math.nan]])
def test_sequences_that_do_not_pair_leave_independent_error_bars(damages):
    member, baseline = make_member("a", 20, 0.95), uniform(20, 0.9)
    other = damages if len(damages) == 1 else [1.0, 2.0, 3.0]
    between = paired({baseline.id: other, member.id: damages})
    assert between(member, baseline) == unpaired(member, baseline)


def test_an_unknown_error_is_never_significant():
    member = make_member("a", 20, 0.99)
    member = replace(member, quality=MemberQuality(0.99, math.nan))
    assert compare([member], uniform(20, 0.5)).verdict is Verdict.TIE


def test_the_line_for_people_says_where_the_search_found_nothing():
    baselines = [uniform(20, 0.9, "u4"), uniform(10, 0.7, "u3"), uniform(5, 0.1, "u2")]
    members = [make_member("a", 9, 0.5), baselines[1], make_member("b", 20, 0.95)]
    line = comparison_summary(against_baselines(members, baselines))
    assert line == (
        "At no more bytes the front is significantly better than 1 of 3 baselines; the search "
        "found nothing else as good as u3; it holds nothing as good as u2."
    )
    assert comparison_summary(()) == ""


def test_comparisons_are_published_and_read_back(tmp_path):
    baselines = [uniform(20, 0.9, "u4"), uniform(10, 0.7, "u3"), uniform(5, math.nan, "u2")]
    broken = replace(make_member("a", 19, 0.95), quality=MemberQuality(0.95, math.nan))
    document = make_document([broken], baselines)
    document.write(tmp_path)
    assert [c.label for c in document.comparisons] == ["tie", "tie (itself)", "none"]
    again = FrontDocument.read(tmp_path)
    assert [c.to_json() for c in again.comparisons] == [c.to_json() for c in document.comparisons]
    assert math.isnan(again.comparisons[0].difference.retained.standard_error)
    data = json.loads((tmp_path / "front.json").read_text())
    assert data["comparisons"][2] == {"baseline": "u2", "verdict": "none"}


def test_a_paired_comparison_reads_back():
    damages = {uniform(20, 0.9).id: [1.0, 2.0], make_member("a", 20, 0.95).id: [0.5, 1.0]}
    comparison = compare([make_member("a", 20, 0.95)], uniform(20, 0.9), paired(damages))
    assert Comparison.from_json(comparison.to_json()) == comparison


def test_a_file_of_a_version_that_did_not_compare_still_loads(document, tmp_path):
    data = {k: v for k, v in document.to_json().items() if k != "comparisons"}
    (tmp_path / "front.json").write_text(json.dumps(data))
    again = FrontDocument.read(tmp_path)
    assert again.comparisons == ()
    assert again.members == document.members


def test_the_summary_says_by_what_verdicts_are_where_sequences_are_known():
    known = Difference(Measurement(0.1, 0.2), Measurement(-0.1, 0.01))
    compared = Comparison("uniform-4bit", known.verdict, member="x", difference=known)
    said = "Verdicts are of the damage of each sequence, in pairs"
    assert said in comparison_summary([compared])
    plain = replace(compared, difference=Difference(Measurement(0.1, 0.2)))
    assert said not in comparison_summary([plain])
