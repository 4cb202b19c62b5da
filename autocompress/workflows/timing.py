"""What a budget of time is spent on besides trials: what precedes them, and the report tokens."""

from __future__ import annotations

from autocompress.evaluate import ForwardPlan
from autocompress.search import Budget, Spent
from autocompress.search.budget import duration
from autocompress.search.reserve import Reserve
from autocompress.workflows.publish import MOST_MEMBERS
from autocompress.workflows.settings import StudyRecord

_OVER_PLAN = 1.5
"""Most seconds per token of a measured front over those of the plan, in the runs under `results/`:
layers are decoded first."""


def report_reserve(record: StudyRecord, n_tokens: int) -> Reserve:
    """For measuring a front as `report_driver` does, at the speed that the forward plan measured.

    Args:
        record: of the study.
        n_tokens: report tokens.
    """
    settings, plan = record.settings, ForwardPlan.from_json(record.resolved["forward"])
    timed = plan.seconds_per_dtype
    seconds = timed.get(record.resolved["report"]["dtype"], timed[plan.dtype])
    return Reserve(
        _OVER_PLAN * seconds / plan.n_tokens * n_tokens,
        MOST_MEMBERS,
        at_once=1 if settings.device == "cpu" else settings.workers,
    )


def time_left(budget: Budget, prepared: float, spent: Spent) -> str:
    """What to say before the trials of a budget of time; empty for other budgets.

    Args:
        budget: of the study.
        prepared: seconds that this run took until now.
        spent: by all runs until now.
    """
    timed = budget.timed
    if not timed.is_limited:
        return ""
    took = f"Preparation took {duration(prepared)}"
    if timed.exhausted(spent):
        return f"{took}, and no time is left: only base and baselines are measured"
    return f"{took}; {timed.remaining(spent)} left for trials and for measuring the front"
