"""Trials one after the other in this process, and layers side by side."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence

import torch

from autocompress.core import Scheme, TrialRequest, TrialResult
from autocompress.core.errors import TrialError
from autocompress.search.context import TrialContext
from autocompress.search.run_trial import run_guarded


class LocalDriver:
    """The plain loop: no processes, no copies. It cannot stop a trial that hangs.

    Args:
        context: the resident model and tokens.
    """

    n_workers = 1

    def __init__(self, context: TrialContext) -> None:
        self._context = context

    @property
    def n_gpus(self) -> float:
        """1 if the base model is on a GPU."""
        return float(self._context.device.type != "cpu")

    def run(self, requests: Iterator[TrialRequest]) -> Generator[TrialResult, None, None]:
        """Results in the order of the requests.

        Raises:
            TrialError: a trial wrote to the base model; what comes after it would be wrong.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self._context.threads)
        try:
            for request in requests:
                outcome = run_guarded(request, context=self._context)
                yield outcome.result
                if outcome.tainted:
                    raise TrialError(
                        f"Trial {request.number} wrote to the base model, which this process "
                        f"cannot repair: {outcome.result.error} Next step: fix the task, or use "
                        "--driver ray, which replaces the worker."
                    )
        finally:
            torch.set_num_threads(threads)

    def fill(self, wanted: Mapping[str, Sequence[Scheme]]) -> Generator[str, None, None]:
        """Names of layers as they are done; on a GPU they are compressed one after the other.

        Raises:
            ModelError, SchemeError: a layer cannot be compressed.
        """
        context = self._context
        yield from context.bank.fill_by_layer(wanted, n_threads=context.fill_threads)

    def close(self) -> None:
        """Nothing to free."""
