"""Whether base and baselines leave enough of a budget of trials for the sampler."""

from __future__ import annotations

from math import ceil

from autocompress.search import Budget

_PROPOSALS = 25
"""After as many `guided` is ahead of NSGA-II and AMQ after a thousand (docs/search_engine.md)."""


def few_proposals(budget: Budget, n_baselines: int) -> str:
    """What to say where a sampler has fewer trials than base and baselines; else empty.

    Args:
        budget: of the study.
        n_baselines: that are measured first, the base not counted.
    """
    n_first = 1 + n_baselines
    if budget.trials is None or budget.trials >= 2 * n_first:
        return ""
    n_left = max(0, budget.trials - n_first)
    advised = 10 * ceil((n_first + max(n_first, _PROPOSALS)) / 10)
    return (
        f"Base and baselines are the first {n_first} trials and leave {n_left} of "
        f"{budget.trials} for the sampler; at least {advised} are advised: --budget '{advised} "
        "trials'"
    )
