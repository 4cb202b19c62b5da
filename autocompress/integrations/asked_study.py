"""A study whose trials someone else runs: it says what to try next and is told how that ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from autocompress.core import Allocation, TrialRequest, TrialResult
from autocompress.search.known import KnownResults
from autocompress.search.sampler import Sampler
from autocompress.search.study import baselines
from autocompress.spaces import SearchSpace

_MAX_REPEATS = 100


class AskedStudy:
    """Baselines first, then what a sampler asks for, as in `autocompress.search.Study`.

    Its state is the journal of what the sampler was told. A study that is restored goes on with the
    sequence that it would have had.

    Args:
        space: what may be chosen.
        new_sampler: makes a fresh sampler of the space.
    """

    def __init__(self, space: SearchSpace, new_sampler: Callable[[], Sampler]) -> None:
        self._space = space
        self._new_sampler = new_sampler
        self._baselines = baselines(space)
        self._start_empty()

    def _start_empty(self) -> None:
        self._sampler = self._new_sampler()
        self._next_number = 0
        self._told: dict[int, TrialResult] = {}
        self._known = KnownResults()
        self._tried: set[Allocation] = set()
        self._running: dict[str, TrialRequest] = {}
        self._restored_states: dict[int, Mapping[str, Any]] = {}

    @property
    def told(self) -> tuple[TrialResult, ...]:
        """What the sampler was told, by number."""
        return tuple(self._told[number] for number in sorted(self._told))

    def ask(self, name: str) -> TrialRequest | None:
        """What the trial of that name measures; None if the space holds nothing further.

        An allocation that was measured before is told again instead of being asked for.
        """
        for _ in range(_MAX_REPEATS):
            request = self._next_request()
            if request is None:
                return None
            repeated = self._known.repeated(request)
            if repeated is None:
                self._running[name] = request
                self._note_tried(request.allocation)
                return request
            self.tell(repeated)
        return None

    def finish(self, name: str) -> TrialRequest | None:
        """What the trial of that name was asked to measure; None if it is not running."""
        return self._running.pop(name, None)

    def tell(self, result: TrialResult) -> None:
        """Let the sampler learn from a finished trial, and remember it."""
        state = dict(self._sampler_state(result.request.number))
        self._learn(replace(result, sampler_state=state))

    def state(self) -> dict[str, Any]:
        """A JSON object that `restore` goes on from."""
        running = {
            name: {
                "number": request.number,
                "source": request.source,
                "allocation": request.allocation.to_json(),
                "sampler_state": dict(self._sampler_state(request.number)),
            }
            for name, request in self._running.items()
        }
        return {
            "next_number": self._next_number,
            "told": [result.to_json() for result in self.told],
            "running": running,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Forget everything and replay the results of a `state`."""
        self._start_empty()
        for result in map(TrialResult.from_json, state["told"]):
            self._learn(result)
        for name, data in state["running"].items():
            allocation = Allocation.from_json(data["allocation"])
            request = TrialRequest(int(data["number"]), allocation, str(data["source"]))
            self._running[name] = request
            self._restored_states[request.number] = dict(data["sampler_state"])
            self._note_tried(allocation)
        self._next_number = int(state["next_number"])

    def _next_request(self) -> TrialRequest | None:
        number = self._next_number
        if number < len(self._baselines):
            name, allocation = self._baselines[number]
            request = TrialRequest(number, allocation, f"baseline:{name}")
        elif len(self._tried) >= self._space.n_combinations:
            return None
        else:
            source = f"sampler:{self._sampler.name}"
            request = TrialRequest(number, self._sampler.ask(number), source)
        self._next_number += 1
        return request

    def _sampler_state(self, number: int) -> Mapping[str, Any]:
        """What the sampler keeps of a trial that it asked for, before a restore or since."""
        restored = self._restored_states.get(number)
        return self._sampler.state(number) if restored is None else restored

    def _learn(self, result: TrialResult) -> None:
        self._told[result.request.number] = result
        self._known.learn(result)
        self._note_tried(result.request.allocation)
        self._sampler.tell(result)

    def _note_tried(self, allocation: Allocation) -> None:
        if allocation not in self._tried and allocation in self._space:
            self._tried.add(allocation)
