from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from front_examples import make_document, make_member
from scipy.stats import t as student

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
    said = (
        "At no more bytes the front is significantly better than 1 of 3 baselines; the search "
        "found nothing else as good as u3; it holds nothing as good as u2."
    )
    searched = {m.id: 1 - m.quality.retained for m in members}
    assert comparison_summary(against_baselines(members, baselines, searched=searched)) == said
    line = comparison_summary(against_baselines(members, baselines))
    assert line == said + " The best that fits is chosen on the same tokens, which flatters it."
    assert comparison_summary(()) == ""


def test_the_line_names_the_baselines_whose_rival_is_flattered():
    baselines = [uniform(20, 0.9, "u4"), uniform(10, 0.7, "u3")]
    members = [make_member("a", 9, 0.75), make_member("b", 19, 0.95)]
    searched = {m.id: 1 - m.quality.retained for m in members}
    known = against_baselines(members, baselines, searched=searched)
    mixed = (replace(known[0], chosen_on="report"), known[1])
    assert "Against u4 the best that fits is chosen on the same tokens" in comparison_summary(mixed)
    assert "flatters" not in comparison_summary(known)


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


def test_the_search_tokens_choose_what_the_report_tokens_judge():
    lucky, chosen = make_member("lucky", 19, 0.95), make_member("chosen", 18, 0.92)
    searched = {lucky.id: 0.3, chosen.id: 0.2}
    (found,) = against_baselines([chosen, lucky], [uniform(20, 0.9)], searched=searched)
    assert (found.member, found.chosen_on) == (chosen.id, "search")
    assert found.difference.retained.value == pytest.approx(0.02)
    (plain,) = against_baselines([chosen, lucky], [uniform(20, 0.9)])
    assert (plain.member, plain.chosen_on) == (lucky.id, "report")


def test_models_that_search_tokens_did_not_see_do_not_stand_unless_none_was_seen():
    seen, unseen = make_member("seen", 19, 0.91), make_member("unseen", 18, 0.99)
    (found,) = against_baselines([seen, unseen], [uniform(20, 0.9)], searched={seen.id: 0.1})
    assert found.member == seen.id


def test_a_judged_model_off_the_front_is_stood_for_by_a_member_that_beats_it():
    member, chosen = make_member("member", 17, 0.96), make_member("chosen", 18, 0.95)
    (found,) = against_baselines(
        [member], [uniform(20, 0.9)], candidates=[member, chosen],
        searched={member.id: 0.3, chosen.id: 0.2},
    )  # fmt: skip
    assert (found.verdict, found.member, found.judged) == (Verdict.BETTER, member.id, chosen.id)
    assert found.difference.retained.value == pytest.approx(0.05)  # of the one that was judged
    assert found.bytes_saved == 3_000_000


def test_a_choice_that_disappoints_gives_way_to_the_best_which_is_no_more_than_a_tie():
    best, chosen = make_member("best", 19, 0.99), make_member("chosen", 18, 0.5)
    searched = {best.id: 0.3, chosen.id: 0.2}
    (found,) = against_baselines([chosen, best], [uniform(20, 0.9)], searched=searched)
    assert (found.verdict, found.member, found.chosen_on) == (Verdict.TIE, best.id, "report")
    (worse,) = against_baselines([chosen], [uniform(20, 0.9)], searched=searched)
    assert worse.verdict is Verdict.WORSE


def test_a_choice_that_the_baseline_alone_beats_gives_way_too():
    baseline, chosen = uniform(20, 0.9), make_member("chosen", 20, 0.899)
    small = make_member("small", 19, 0.898)
    searched = {chosen.id: 0.1, small.id: 0.2}

    def against(members):
        (found,) = against_baselines(
            members, [baseline], candidates=[*members, chosen], searched=searched
        )
        return found

    tie = against([baseline, small])
    assert (tie.label, tie.member) == ("tie", small.id)
    assert tie.difference.retained.value == pytest.approx(-0.002)
    alone = against([baseline])
    assert (alone.label, alone.difference.retained.value) == ("tie (itself)", 0.0)


def test_baselines_are_judged_together():
    """Holm: the k-th smallest of n chances is held to 5 % / (n - k + 1)."""
    gaps = {"u1": 2.3, "u2": 2.0, "u3": 1.0}  # chances 0.011, 0.023 and 0.16
    baselines = [uniform(20, 0.9 - gap * ERROR, name) for name, gap in gaps.items()]
    member = make_member("a", 20, 0.9)
    found = against_baselines([member], baselines)
    assert [c.verdict.value for c in found] == ["better", "better", "tie"]
    apart = against_baselines([member], baselines[1:])
    assert [c.verdict.value for c in apart] == ["better", "tie"]
    gaps["u1"] = 2.0  # 0.023 is more than 5 % / 3, so all that follow are ties
    baselines[0] = uniform(20, 0.9 - 2.0 * ERROR, "u1")
    assert {c.verdict for c in against_baselines([member], baselines)} == {Verdict.TIE}


def test_few_sequences_need_larger_differences():
    member, baseline = make_member("a", 20, 0.902), uniform(20, 0.9)
    for n in (3, 10, 100):
        gaps = [0.05 * (-1) ** i - 0.02 for i in range(n)]
        damages = {baseline.id: [1.0] * n, member.id: [1.0 + gap for gap in gaps]}
        difference = paired(damages)(member, baseline)
        score = difference.damage.value / difference.damage.standard_error
        assert difference.p_value == pytest.approx(student.cdf(score, n - 1))


def equal_models(generator, n_models, n_baselines, n_sequences):
    """Report and search damages of models and baselines that are all equally good."""
    ids = [f"m{i}" for i in range(n_models)] + [f"u{i}" for i in range(n_baselines)]
    noise = generator.standard_normal((2, len(ids), n_sequences))
    report, search = 1 + 0.1 * noise
    members = [
        make_member(name, 20 - i / 100, 1 - report[i].mean() / 10, is_baseline=name[0] == "u")
        for i, name in enumerate(ids)
    ]
    damages = {m.id: tuple(row) for m, row in zip(members, report, strict=True)}
    searched = {m.id: float(row.mean()) for m, row in zip(members, search, strict=True)}
    models, baselines = members[:n_models], members[n_models:]
    return models, [replace(b, storage_bytes=21_000_000) for b in baselines], damages, searched


def test_of_equal_models_at_most_one_study_in_twenty_calls_one_better():
    generator = np.random.default_rng(0)
    n_studies, wrong = 600, {"search": 0, "report": 0}
    for _ in range(n_studies):
        models, baselines, damages, searched = equal_models(generator, 10, 3, 16)
        for name, known in (("search", searched), ("report", {})):
            document = make_document(models)
            compared = against_baselines(
                document.members, baselines, paired(damages), candidates=models, searched=known
            )
            wrong[name] += any(c.verdict is Verdict.BETTER for c in compared)
    allowed = 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / n_studies)
    assert wrong["search"] / n_studies < allowed
    assert wrong["report"] / n_studies > 2 * allowed  # what choosing on the same tokens would do
