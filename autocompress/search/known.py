"""What is known of allocations, so that none is measured for a second time."""

from __future__ import annotations

from dataclasses import replace

from autocompress.core import Allocation, TrialRequest, TrialResult


class KnownResults:
    """The first result of each allocation, or its first complete one."""

    def __init__(self) -> None:
        self._results: dict[Allocation, TrialResult] = {}

    def learn(self, result: TrialResult) -> None:
        """Remember a finished trial."""
        allocation = result.request.allocation
        known = self._results.get(allocation)
        if known is None or (result.is_complete and not known.is_complete):
            self._results[allocation] = result

    def repeated(self, request: TrialRequest) -> TrialResult | None:
        """The answer to a request, at no cost, from an earlier trial of the same allocation.

        None if it has to be measured: it never was, or it is a baseline, of which all tokens are
        wanted, and the earlier trial was stopped early.
        """
        known = self._results.get(request.allocation)
        if known is None or (request.is_baseline and known.is_early_stopped):
            return None
        note = f"same allocation as trial {known.request.number}"
        return replace(
            known, request=request, seconds=0.0, n_tokens=0, notes=(note,), sampler_state={}
        )
