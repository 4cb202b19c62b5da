import pytest

from autocompress.core.errors import BudgetError
from autocompress.search.budget import Budget, Spent


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200 trials", Budget(trials=200)),
        ("200", Budget(trials=200)),
        ("1 trial", Budget(trials=1)),
        ("30m", Budget(seconds=1800.0)),
        ("1h30m", Budget(seconds=5400.0)),
        ("1h 30m", Budget(seconds=5400.0)),
        ("90s", Budget(seconds=90.0)),
        ("1.5h", Budget(seconds=5400.0)),
        ("10 minutes", Budget(seconds=600.0)),
        ("2e6 tokens", Budget(tokens=2e6)),
        ("4 gpu-hours", Budget(gpu_seconds=14400.0)),
    ],
)
def test_a_budget_is_read_in_the_forms_that_people_write(text, expected):
    assert Budget.parse(text) == expected
    assert Budget.parse([text]) == expected


def test_several_limits_hold_together_and_the_smaller_of_one_kind_counts():
    budget = Budget.parse(["200 trials", "30m", "50 trials"])
    assert budget == Budget(trials=50, seconds=1800.0)


@pytest.mark.parametrize("text", ["0", "0 trials", "-3 trials", "0.5 trials", "-5m", "0s", "1e999"])
def test_a_budget_that_allows_no_trial_is_refused(text):
    with pytest.raises(BudgetError, match=r"'200 trials', '30m'"):
        Budget.parse(text)


def test_half_a_trial_more_is_refused():
    with pytest.raises(BudgetError, match="counted"):
        Budget.parse("2.5 trials")


@pytest.mark.parametrize("text", ["", "soon", "ten trials", "nan trials"])
def test_what_is_no_amount_is_refused_with_examples(text):
    with pytest.raises(BudgetError, match="Examples: '200 trials'"):
        Budget.parse(text)


def test_a_misspelt_unit_gets_the_nearest_one():
    with pytest.raises(BudgetError, match="Did you mean 'trials'"):
        Budget.parse("200 trails")


def test_no_budget_at_all_is_refused():
    with pytest.raises(BudgetError, match="needs a budget"):
        Budget.parse([])


def test_whichever_limit_is_reached_first_ends_the_study():
    budget = Budget.parse(["10 trials", "60s", "1000 tokens"])
    assert not budget.exhausted(Spent(trials=9, seconds=59.0, tokens=999))
    assert budget.exhausted(Spent(trials=10))
    assert budget.exhausted(Spent(seconds=60.0))
    assert budget.exhausted(Spent(tokens=1000))


def test_progress_is_that_of_the_scarcest_limit():
    budget = Budget.parse(["10 trials", "100s"])
    assert budget.fraction(Spent()) == 0.0
    assert budget.fraction(Spent(trials=2, seconds=50.0)) == 0.5
    assert budget.fraction(Spent(trials=50)) == 1.0


def test_what_remains_is_said_in_words():
    budget = Budget.parse(["10 trials", "1h", "2e6 tokens", "1 gpu-hours"])
    spent = Spent(trials=9, seconds=400.0, tokens=5e5, gpu_seconds=1800.0)
    assert budget.remaining(spent) == "1 trial, 53m 20s, 1,500,000 tokens, 0.5 GPU-hours"
    assert Budget.parse("30s").remaining(Spent(seconds=99)) == "0s"


def test_limits_of_time_are_told_from_the_others():
    budget = Budget.parse(["10 trials", "1h", "1 gpu-hours", "50 tokens"])
    assert budget.untimed == Budget(trials=10, tokens=50.0)
    assert budget.timed == Budget(seconds=3600.0, gpu_seconds=3600.0)
    assert budget.timed.is_limited
    assert not Budget.parse("10 trials").timed.is_limited
    assert not Budget.parse("1h").untimed.exhausted(Spent(trials=9, seconds=1e9))
