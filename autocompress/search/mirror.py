"""A mirror of the journal as an Optuna storage that optuna-dashboard opens.

The journal is the truth; the mirror is written behind it by a thread, so that no trial waits for
it, and is rebuilt whenever a study starts. Open it with ``optuna-dashboard <run>/optuna.log``.
"""

from __future__ import annotations

import logging
import queue
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, create_trial

from autocompress.core import DEFAULT_OBJECTIVES, Objectives, TrialResult
from autocompress.core.errors import SpaceError
from autocompress.search.samplers import distributions, new_study, outcome
from autocompress.spaces import SearchSpace

_log = logging.getLogger(__name__)

STUDY_NAME = "autocompress"


class Mirror:
    """Writes finished trials to an Optuna storage in the background; a context manager.

    A mirror that cannot be written is given up with one warning: it never stops a study.

    Args:
        path: the file, ``<run>/optuna.log``; replaced if it exists.
        space: gives each trial its parameters.
        results: trials of earlier runs, in the order of the journal.
        objectives: what the values of a trial are.
    """

    def __init__(
        self,
        path: Path,
        space: SearchSpace,
        results: Iterable[TrialResult] = (),
        objectives: Objectives = DEFAULT_OBJECTIVES,
    ) -> None:
        self.path = path
        self._objectives = objectives
        self._space = space
        self._distributions = distributions(space)
        self._queue: queue.SimpleQueue[TrialResult | None] = queue.SimpleQueue()
        for result in results:
            self._queue.put(result)
        self._study = self._create()
        self._thread = threading.Thread(target=self._write_all, name="optuna-mirror", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, result: TrialResult) -> None:
        """Mirror a finished trial, later."""
        self._queue.put(result)

    def close(self) -> None:
        """Wait until everything is written."""
        self._queue.put(None)
        self._thread.join()

    def _create(self) -> Study | None:
        try:
            # A crash may leave Optuna's lock behind. The journal's lock says that no other search
            # writes here.
            self.path.with_name(f"{self.path.name}.lock").unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            storage = JournalStorage(JournalFileBackend(str(self.path)))
        except OSError as error:
            self._give_up(error)
            return None
        study = new_study(storage, STUDY_NAME, self._objectives)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # names of axes, no more
            study.set_metric_names(list(self._objectives.names))
        return study

    def _write_all(self) -> None:
        while (result := self._queue.get()) is not None:
            if self._study is None:
                continue
            try:
                self._study.add_trial(self._trial(result))
            except OSError as error:
                self._give_up(error)
                self._study = None

    def _give_up(self, error: OSError) -> None:
        _log.warning(
            "The Optuna storage %s is given up and incomplete; the journal is not affected: %s",
            self.path,
            error,
        )

    def _trial(self, result: TrialResult) -> FrozenTrial:
        try:
            levels = self._space.encode(result.request.allocation)
        except SpaceError:  # such as the base model where no choice offers it
            levels = {}
        return create_trial(
            params=levels,
            distributions=self._distributions if levels else {},
            user_attrs=_attributes(result),
            **outcome(result, None, self._objectives),
        )


def _attributes(result: TrialResult) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "id": result.request.allocation.digest,
        "number": result.request.number,
        "source": result.request.source,
        "status": result.status.value,
        "seconds": result.seconds,
    }
    if result.metrics is not None:
        attributes["retained"] = result.metrics.quality.retained
    return attributes | ({"error": result.error} if result.error else {})
