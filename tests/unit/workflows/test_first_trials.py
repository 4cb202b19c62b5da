"""What a search says of a budget that base and baselines take most of."""

import pytest

from autocompress.search import Budget
from autocompress.workflows.first_trials import few_proposals


@pytest.mark.parametrize(
    ("budget", "n_baselines", "left"),
    [("20 trials", 12, "7 of 20"), ("25 trials", 12, "12 of 25"), ("5 trials", 12, "0 of 5")],
)
def test_few_trials_for_the_sampler_are_worth_a_line(budget, n_baselines, left):
    said = few_proposals(Budget.parse(budget), n_baselines)
    assert said.startswith(f"Base and baselines are the first 13 trials and leave {left} for")
    assert said.endswith("--budget '40 trials'")


@pytest.mark.parametrize(
    ("budget", "n_baselines"), [("26 trials", 12), ("16 trials", 5), ("30m", 12)]
)
def test_enough_trials_and_other_budgets_are_not(budget, n_baselines):
    assert few_proposals(Budget.parse(budget), n_baselines) == ""


def test_what_is_advised_is_enough():
    for n_baselines in range(40):
        advised = few_proposals(Budget(trials=1), n_baselines).rpartition("--budget ")[2].strip("'")
        assert few_proposals(Budget.parse(advised), n_baselines) == ""
