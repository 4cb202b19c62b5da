"""Ray Tune: a `Searcher` over our samplers and a `Trainable` that keeps its model resident.

A trial's config is flat: the label of an option by the name of each choice, so that Tune's tables
and data frames read as hyperparameters do. A trial reports damage, retained quality, every resource
and every metric of the task by name, and its whole result as one line of JSON, which the searcher
and `front_of` read. See docs/ray_tune.md for a complete example.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import tune
from ray.tune.search import Searcher

from autocompress.core import (
    BASE_ALLOCATION,
    DAMAGE,
    DEFAULT_OBJECTIVES,
    Measurement,
    Metrics,
    Objectives,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.core.errors import RunDirectoryError, UsageError
from autocompress.core.files import write_atomically
from autocompress.integrations.asked_study import AskedStudy
from autocompress.integrations.tune_rows import (
    config_of,
    front_of,
    reported,
    request_of,
    row_of,
    sign_of,
    trials_of,
)
from autocompress.search import SAMPLERS, TrialContext
from autocompress.search.option_table import OptionTable
from autocompress.search.run_trial import run_guarded
from autocompress.search.sampler import Constraints
from autocompress.search.shipping import ContextParts, pack_context
from autocompress.spaces import SearchSpace

__all__ = [
    "AutocompressSearcher",
    "CompressionTrainable",
    "front_of",
    "param_space",
    "trials_of",
    "with_context",
]

_FORMAT = 1


def param_space(space: SearchSpace) -> dict[str, Any]:
    """The space in Tune's own words, for Tune's other searchers."""
    return {c.name: tune.choice([o.label for o in c.options]) for c in space.choices}


class AutocompressSearcher(Searcher):  # type: ignore[misc]  # Ray is not typed
    """Proposes what a sampler asks for: the baselines first, then the sampler's own sequence.

    Objectives are the quality that `metric` names, and resources: stored bytes unless `optimize`
    says otherwise. The searcher's state is
    the journal of what the sampler was told, from which ``Tuner.restore`` goes on with the sequence
    that an uninterrupted experiment has. An allocation that was measured before costs no trial.

    Args:
        space: what may be chosen.
        sampler: name of a sampler.
        seed: of the sampler.
        constraints: named values of a complete trial, feasible if none is above 0; a function
            that can be pickled.
        table: predicted damage and costs of every option, for samplers that use one.
        metric: what trials report as their quality or loss, e.g. ``damage``, ``perplexity``.
        mode: ``min``, or ``max`` for a share such as ``accuracy``, of which samplers minimise the
            rest to 1.
        optimize: ``quality`` and the resources that it is traded for, as in a search; ``quality``
            is what `metric` names.

    Raises:
        UnknownNameError: no such sampler.
        UsageError: the mode is neither, or the sampler needs a table and there is none.
    """

    CKPT_FILE_TMPL = "searcher-state-{}.json"

    def __init__(
        self,
        space: SearchSpace,
        *,
        sampler: str = "nsga2",
        seed: int = 0,
        constraints: Constraints | None = None,
        table: OptionTable | None = None,
        metric: str = DAMAGE,
        mode: str = "min",
        optimize: str = DEFAULT_OBJECTIVES.text,
    ) -> None:
        sign_of(mode)
        objectives = Objectives.parse(optimize)
        resources = list(objectives.resources)
        super().__init__(metric=[metric, *resources], mode=[mode, *["min"] * len(resources)])
        kind = SAMPLERS[sampler]
        if kind.needs_table and table is None:
            raise UsageError(
                f"The sampler {sampler!r} needs the predicted damage of every option. Next step: "
                "give table=, or a sampler that works without one."
            )
        self._space = space
        self._arguments: dict[str, Any] = {
            "sampler": sampler, "seed": seed, "constraints": constraints, "table": table,
            "metric": metric, "mode": mode, "optimize": objectives.text,
        }  # fmt: skip
        self._study = AskedStudy(
            space,
            lambda: kind(
                space, seed=seed, constraints=constraints, table=table, objectives=objectives
            ),
        )

    @property
    def told(self) -> tuple[TrialResult, ...]:
        """What the sampler was told, by number."""
        return self._study.told

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The config of the next trial; ``FINISHED`` when the space holds no further one."""
        request = self._study.ask(trial_id)
        return str(self.FINISHED) if request is None else config_of(request, self._space)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the sampler how a trial ended.

        Args:
            trial_id: Tune's name of the trial.
            result: what it reported last, flat; None if it reported nothing.
            error: its worker died or raised, as often as Tune was willing to retry.
        """
        request = self._study.finish(trial_id)
        trial = None if error else reported(result or {})
        if trial is not None:
            self._study.tell(self._scored(trial, result or {}))
        elif request is not None:  # else it was told before, and Tune has tried it once more
            self._study.tell(_unmeasured(request, error=error))

    def save(self, checkpoint_path: str) -> None:
        """Write the journal of told results and the running trials as JSON."""
        write_atomically(Path(checkpoint_path), json.dumps(self.get_state()))

    def restore(self, checkpoint_path: str) -> None:
        """Go on from a saved journal.

        Raises:
            RunDirectoryError: the file is damaged, or of another space, sampler or seed.
        """
        try:
            self.set_state(json.loads(Path(checkpoint_path).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise RunDirectoryError(
                f"The searcher's state {checkpoint_path} is damaged ({type(error).__name__}: "
                f"{error}). Next step: restore it from a backup, or start a new experiment."
            ) from error

    def get_state(self) -> dict[str, Any]:
        """A JSON object that `set_state` goes on from."""
        return {"format": _FORMAT, "study": self._identity(), **self._study.state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Forget everything and replay the journal of `get_state`; see `restore` for errors."""
        if (state["format"], state["study"]) != (_FORMAT, self._identity()):
            raise RunDirectoryError(
                f"The searcher's state belongs to another study: it was {state['study']}, and this "
                f"one is {self._identity()}. Next step: give the same space, sampler and seed."
            )
        self._study.restore(state)

    def __getstate__(self) -> dict[str, Any]:
        """Values only: Tune copies and pickles its searcher."""
        return {"space": self._space, "arguments": self._arguments, "state": self.get_state()}

    def __setstate__(self, pickled: Mapping[str, Any]) -> None:
        self.__init__(pickled["space"], **pickled["arguments"])  # type: ignore[misc]  # unpickling
        self.set_state(pickled["state"])

    def _identity(self) -> dict[str, Any]:
        named = ("sampler", "seed", "metric", "mode", "optimize")
        kept = {name: self._arguments[name] for name in named}
        return {"space": self._space.digest, **kept}

    def _scored(self, trial: TrialResult, row: Mapping[str, Any]) -> TrialResult:
        """The result with the chosen metric as the damage that samplers minimise."""
        name = self._arguments["metric"]
        if trial.metrics is None or name == DAMAGE:
            return trial
        value = float(row.get(name, math.nan))
        loss = value if self._arguments["mode"] == "min" else 1.0 - value
        if not math.isfinite(loss):
            text = f"The trial reported no finite {name!r}, which the search is for."
            return replace(trial, status=TrialStatus.NOT_FINITE, metrics=None, error=text)
        quality = replace(trial.metrics.quality, damage=Measurement(loss, 0.0))
        return replace(trial, metrics=Metrics(quality, trial.metrics.resources))


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all workers of a node read from one copy in the object store.

    Attributes:
        parts: the trial context.
        space: to read configs with.
        rungs: shares of the search split that a trial is measured on in turn; the last one is 1.
        threads: torch threads of a worker.
        directory: working directory of the driver, to which relative paths refer.
        tainted: one byte, not 0 once a trial wrote to `parts`; workers that share that memory
            share this byte.
    """

    parts: ContextParts
    space: SearchSpace
    rungs: tuple[float, ...]
    threads: int
    directory: str
    tainted: NDArray[np.uint8]


class CompressionTrainable(tune.Trainable):  # type: ignore[misc]  # Ray is not typed
    """Measures the allocation that its config names; made by `with_context`.

    The model is built once per worker; with ``TuneConfig(reuse_actors=True)`` it stays there for
    all trials. One step is one rung. What goes wrong in a trial is a status that it reports, and
    only the death of the worker, or a config that the space cannot read, is an error of Tune's.
    """

    def setup(self, config: dict[str, Any], shared: _Shared | None = None) -> None:
        """Build the resident context; called once per worker."""
        if shared is None:
            raise UsageError(
                "CompressionTrainable needs a model and a space. Next step: give the Tuner what "
                "with_context(context, space) returns."
            )
        self._shared = shared
        torch.set_num_threads(shared.threads)
        context = shared.parts.build()
        self._contexts = tuple(_at_rung(context, share) for share in shared.rungs)
        self._resources = tuple(context.cost.resources(BASE_ALLOCATION))
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start the next trial on the resident model."""
        with suppress(OSError):  # another machine
            os.chdir(self._shared.directory)
        self._trial_config = new_config
        self._rung, self._seconds, self._n_tokens = 0, 0.0, 0
        return True

    def step(self) -> dict[str, Any]:
        """Measure one rung.

        A trial that a scheduler stops between rungs has reported itself as early-stopped.

        Raises:
            SpaceError: the config does not name an allocation of the space.
        """
        request = request_of(self._trial_config, self._shared.space)
        guarded = run_guarded(request, context=self._contexts[self._rung])
        self._rung += 1
        result = self._checked(guarded.result, tainted=guarded.tainted)
        self._seconds += result.seconds
        self._n_tokens += result.n_tokens
        result = replace(result, seconds=self._seconds, n_tokens=self._n_tokens)
        return {
            **row_of(result, self._resources),
            "done": result.status is not TrialStatus.EARLY_STOPPED,
        }

    def _checked(self, result: TrialResult, *, tainted: bool) -> TrialResult:
        """The result, refused if any trial on this memory wrote to it."""
        flag = self._shared.tainted
        if tainted:
            ctypes.memset(flag.ctypes.data, 1, 1)  # the array is marked read-only, its memory not
        elif flag[0]:
            text = (
                "An earlier trial wrote to the base model that all workers of this node share. "
                "Next step: mend the task, make the trainable anew with with_context, and start "
                "again."
            )
            return TrialResult(result.request, TrialStatus.FAILED, error=text)
        elif result.is_complete and self._rung < len(self._contexts):
            return replace(result, status=TrialStatus.EARLY_STOPPED)
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:  # noqa: ARG002 (Tune's)
        """What a trial that a scheduler pauses has done so far."""
        return {"rung": self._rung, "seconds": self._seconds, "tokens": self._n_tokens}

    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on after a pause, maybe on another worker."""
        self._rung, self._n_tokens = int(checkpoint["rung"]), int(checkpoint["tokens"])
        self._seconds = float(checkpoint["seconds"])


def with_context(
    context: TrialContext,
    space: SearchSpace,
    *,
    rungs: Sequence[float] = (1.0,),
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    with_statistics: bool = False,
) -> type[CompressionTrainable]:
    """The trainable of one model: its memory is put into Ray's object store once.

    Args:
        context: the resident model, bank and tokens; not changed.
        space: what configs choose from.
        rungs: shares of the search tokens, ascending to 1. A trial reports after each, so that a
            scheduler can stop it; each rung is measured anew.
        cpus_per_worker: CPUs that a trial reserves.
        gpus_per_worker: GPUs, or a fraction of one.
        with_statistics: take the calibration statistics along, for a cluster whose nodes share no
            file system.

    Returns:
        For ``Tuner(trainable)`` and ``Tuner.restore(path, trainable)``. Make a new one after Ray
        was shut down.

    Raises:
        UsageError: the rungs do not ascend to 1, the model is on a GPU and workers are not, or a
            part of the context cannot be sent to another process.
    """
    shares = tuple(map(float, rungs))
    if not shares or list(shares) != sorted({0.0, *shares})[1:] or shares[-1] != 1.0:
        raise UsageError(
            f"Rungs are shares of the search tokens that ascend to 1, but got {list(shares)}. "
            "Example: rungs=(0.25, 0.5, 1)."
        )
    parts = pack_context(context, with_statistics=with_statistics)
    if parts.needs_gpu and not gpus_per_worker:
        raise UsageError(
            "The base model is on a GPU, so each worker needs one or a fraction of one. Next "
            "step: give gpus_per_worker=1."
        )
    threads = max(1, min(context.threads, int(cpus_per_worker)))
    tainted = np.zeros(1, dtype=np.uint8)
    shared = _Shared(parts, space, shares, threads, str(Path.cwd()), tainted)
    resources = {"cpu": cpus_per_worker, "gpu": gpus_per_worker}
    trainable: type[CompressionTrainable] = tune.with_resources(
        tune.with_parameters(CompressionTrainable, shared=shared), resources
    )
    return trainable


def _at_rung(context: TrialContext, share: float) -> TrialContext:
    """The context on the first sequences of its split, at least two."""
    if share == 1.0:
        return context
    n_sequences = max(2, math.ceil(share * len(context.split)))
    reference = context.task.rows(context.reference, context.split, 0, n_sequences)
    split = context.split.head(n_sequences)
    return replace(context, split=split, reference=reference, racing=None, rungs=())


def _unmeasured(request: TrialRequest, *, error: bool) -> TrialResult:
    if error:
        text = "Its worker died or could not start; Tune keeps the error with the trial."
        return TrialResult(request, TrialStatus.WORKER_DIED, error=text)
    text = "Tune stopped it before it had measured anything."
    return TrialResult(request, TrialStatus.EARLY_STOPPED, error=text)
