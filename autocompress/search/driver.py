"""The driver contract: where trials run, and where layers are compressed ahead of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Protocol

from autocompress.core import Scheme, TrialRequest, TrialResult


class Driver(Protocol):
    """Runs trials, one or several at a time.

    A driver takes a request only when a worker is free, and gives a result back before it takes
    the next request: what is asked can depend on all that was answered. A trial that fails is a
    result, never an exception. Held to `autocompress.testing.driver_contract`.
    """

    @property
    def n_workers(self) -> int:
        """Trials that run at the same time."""
        ...

    @property
    def n_gpus(self) -> float:
        """GPUs that all workers hold together."""
        ...

    def run(self, requests: Iterator[TrialRequest]) -> Generator[TrialResult, None, None]:
        """Results in the order in which they finish, one for each request.

        Closing the generator drops the trials that are running.

        Raises:
            TrialError: no worker can run trials.
        """
        ...

    def fill(self, wanted: Mapping[str, Sequence[Scheme]]) -> Generator[str, None, None]:
        """Have all workers compress layers into the bank; names of layers as they are done.

        Each layer is named once. What the bank then lacks (its worker died or failed, or keeps its
        bank elsewhere) is compressed by whoever asks the bank for it. Closing the generator drops
        the layers that are under way.

        Args:
            wanted: schemes by layer name, in the order in which the layers are begun.

        Raises:
            ModelError, SchemeError: in this process a layer cannot be compressed.
            TrialError: no worker can start.
        """
        ...

    def close(self) -> None:
        """Free the workers; a driver is not used after that."""
        ...
