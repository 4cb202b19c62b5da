"""The main verb: from settings to a run directory with journal, front and report."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from autocompress.core import TrialResult
from autocompress.core.errors import AutocompressError, RunDirectoryError, UsageError
from autocompress.fronts import FrontDocument, pick
from autocompress.report.progress import StudyProgress
from autocompress.search import (
    SAMPLERS,
    Budget,
    Driver,
    Journal,
    Mirror,
    Sampler,
    Spent,
    Study,
    TrialContext,
)
from autocompress.search.clock import Clock
from autocompress.search.dnas.mixture import require_room
from autocompress.search.journal import JOURNAL_FILE
from autocompress.search.option_costs import option_costs
from autocompress.search.option_table import OptionTable
from autocompress.search.sampler import require_budgets
from autocompress.workflows.aims import parse_aims
from autocompress.workflows.bank_room import small_bank
from autocompress.workflows.contexts import (
    make_driver,
    report_context,
    report_driver,
    search_context,
)
from autocompress.workflows.effort import with_effort
from autocompress.workflows.finalize import finalize_in
from autocompress.workflows.first_trials import few_proposals
from autocompress.workflows.owl import recorded_owl, resolved_owl
from autocompress.workflows.predictions import Predictions
from autocompress.workflows.probing import search_probe
from autocompress.workflows.publish import (
    finalized_members,
    front_document,
    measure_on_report_tokens,
    search_damages,
    shortlist,
)
from autocompress.workflows.reach import few_tokens, slow_methods
from autocompress.workflows.report import write_provenance, write_report
from autocompress.workflows.run import Run
from autocompress.workflows.session import Session, open_session
from autocompress.workflows.settings import (
    CACHE_FOLDER,
    STUDY_FILE,
    SearchSettings,
    StudyRecord,
    cache_directory,
    require_same_study,
)
from autocompress.workflows.tasks import require_same_details
from autocompress.workflows.timing import report_reserve, time_left
from autocompress.workflows.training import with_preferences

_log = logging.getLogger(__name__)

MIRROR = "optuna.log"
IN_PART = "interrupted: the front is of what is measured; --resume completes it"
_INPUTS = {
    "model_digest": "model",
    "splits_digest": "data",
    "space_digest": "space",
    "device_digest": "device profile",
}
INTERRUPTED = "interrupted: publishing what is finished (Ctrl-C again to stop at once)"


def search(
    model: str | Path,
    *,
    effort: str = "standard",
    space: str | Path | None = None,
    target: str = "any",
    rotate: str = "none",
    data: str | Path = "auto",
    task: str = "auto",
    sampler: str = "guided",
    budget: str | int | Sequence[str] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    driver: str = "local",
    workers: int = 1,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    calibration_tokens: int | None = None,
    search_tokens: int | None = None,
    report_tokens: int | None = None,
    sequence_length: int = 256,
    trial_timeout: float | None = None,
    device_profile: str = "cpu-2core-avx512",
    trust_remote_code: bool = False,
    token_weighting: str = "gradient",
    cache: str | Path | None = None,
    bank_size: str | None = None,
    aim: str | Sequence[str] = (),
    finalize: bool | None = None,
    optimize: str = "quality,bytes",
    progress: bool = False,
) -> Run:
    """Search compressed versions of a model; the Python twin of ``autocompress search``.

    Args:
        model: directory, hub id or ``package:NAME/FOLDER``.
        effort: what `space`, `budget`, the numbers of tokens and `finalize` are where they are
            None: ``standard`` (``joint``, 100 trials; 8192, 4096 and 8192 tokens; yes) or
            ``quick``, for a first look (``quick``, 16 trials; 2048, 1024 and 1536; no).
        space: name of a shipped search space, or path of a YAML file.
        target: where the compressed model is to run (``any``, ``transformers``, ``vllm``,
            ``llama.cpp``, ``openvino``): options of the space that cannot run there are left out.
        rotate: ``hadamard`` rotates the whole model first, where its architecture allows it.
        data: file, `datasets` directory, hub name or built-in; ``auto`` for the task's default.
        task: name of a task; ``auto`` reads it from the model's config.
        sampler: ``guided`` or another one that ``autocompress samplers`` lists.
        budget: one limit or several, e.g. ``["40 trials", "10m"]``; the first one reached ends it.
            A number is of trials. Time counts from here, and some is left for the report tokens.
        out: run directory; by default a new one under ``results/``.
        resume: go on with the search in `out`.
        driver: ``local`` or ``ray``.
        workers: trials at the same time (Ray).
        gpus_per_worker: GPUs per Ray worker; may be a fraction.
        address: Ray cluster to join.
        seed: of the splits and the sampler.
        device: torch device.
        dtype: of search-time forwards; ``auto`` measures.
        calibration_tokens: tokens for layer statistics.
        search_tokens: tokens of every trial.
        report_tokens: held-out tokens of the front.
        sequence_length: tokens per sequence.
        trial_timeout: seconds after which a trial is given up (Ray only).
        device_profile: device of the latency: a name, or a file of `autocompress device`.
        trust_remote_code: let code of the model repository run.
        token_weighting: ``gradient`` or ``none``: how tokens count in layer statistics.
        cache: directory of statistics and bank; by default in `out`; runs may share one.
        bank_size: largest size of the bank on disk, e.g. ``20GB``.
        aim: sizes like ``60MB`` at which the best model is wanted most; by default the baselines'.
            Times like ``3ms`` where `optimize` names latency before bytes.
        finalize: rebuild the member of best cost efficiency with more care at the end.
        optimize: ``quality`` and what it is traded for: ``bytes``, ``latency``, ``bytes_moved``,
            ``macs``, or several of them, the main one first.
        progress: draw progress bars on stderr.

    Raises:
        UsageError: an argument is wrong; its subclasses say which kind (model, data, space).
        RunDirectoryError: `out` is not empty, cannot be written, or is damaged.
        TrialError: every trial failed.
    """
    limits = (str(budget),) if isinstance(budget, str | int) else budget
    aim = (aim,) if isinstance(aim, str) else aim
    settings = SearchSettings(
        model=str(model), task=task, data=str(data), target=target, rotate=rotate, sampler=sampler,
        driver=driver, workers=workers, gpus_per_worker=gpus_per_worker, address=address,
        seed=seed, device=device, dtype=dtype, sequence_length=sequence_length,
        trial_timeout_seconds=trial_timeout, device_profile=device_profile,
        trust_remote_code=trust_remote_code, token_weighting=token_weighting,
        cache=None if cache is None else str(cache), bank_size=bank_size, aim=tuple(aim),
        optimize=optimize,
        **with_effort(effort, {
            "space": None if space is None else str(space),
            "budget": None if limits is None else tuple(limits),
            "calibration_tokens": calibration_tokens, "search_tokens": search_tokens,
            "report_tokens": report_tokens, "finalize": finalize,
        }),
    )  # fmt: skip
    return run_search(settings, None if out is None else Path(out), resume, show_progress=progress)


def run_search(
    settings: SearchSettings, out: Path | None, resume: bool, *, show_progress: bool
) -> Run:
    """Run or resume a search; see `search` for arguments and errors."""
    clock = Clock(float(settings.device != "cpu"))
    budget = Budget.parse(settings.budget)
    objectives = settings.objectives
    aims = parse_aims(settings.aim, objectives)
    sampler_class = SAMPLERS[settings.sampler]
    require_budgets(sampler_class, objectives)
    directory = _run_directory(settings, out, resume)
    old = StudyRecord.read(directory) if resume else None
    if old is not None:
        require_same_study(old.settings, settings)
    with StudyProgress(enabled=show_progress) as shown:
        session = open_session(settings, cache_directory(settings, directory), shown)
        space = session.space
        if sampler_class.needs_training:
            require_room(space, session.base.layout)
        _advise(shown, few_tokens(session))
        _advise(shown, slow_methods(space))
        record = study_record(session, old)
        proposed = recorded_owl(record.resolved, space)
        _advise(shown, few_proposals(budget, len(space.baselines()) + len(proposed)))
        with (
            Journal(directory / JOURNAL_FILE) as journal,
            Mirror(directory / MIRROR, space, journal.read(), objectives) as mirror,
        ):
            _write(record, directory)  # by the one that holds the journal
            context = search_context(session, record)
            _advise(shown, small_bank(space, context.bank.capacity_bytes))
            with closing(make_driver(settings, context)) as driver:
                clock.hold(driver.n_gpus)
                table = _table(sampler_class, session, context, driver, directory)
                sampler = sampler_class(
                    space, seed=settings.seed, table=table, aims=aims, objectives=objectives,
                    costs=option_costs(space, session.base.layout, session.cost),
                )  # fmt: skip
                prepared = clock.elapsed.seconds
                study = Study(
                    space, sampler, driver, journal, budget, mirror=mirror, progress=shown.trial,
                    proposed=proposed, clock=clock,
                    reserve=report_reserve(record, session.splits.report.n_tokens),
                )  # fmt: skip
                _advise(shown, time_left(budget, prepared, study.spent))
                results = study.run()
                spent = study.spent
        if study.interrupted:
            shown.step(INTERRUPTED)
        run, in_part = _publish(session, record, results, spent, directory)
        if settings.finalize and not study.interrupted and not in_part:
            return _finalized(run, session, record)
        return run


def _advise(shown: StudyProgress, line: str) -> None:
    if line:
        shown.say(line)


def _table(
    sampler: type[Sampler],
    session: Session,
    context: TrialContext,
    driver: Driver,
    directory: Path,
) -> OptionTable | None:
    """What the sampler predicts from, filled by the workers and kept in the directory too."""
    if not sampler.needs_table:
        return None
    probe = search_probe(session, context.module)
    table = session.option_table(context.bank, session.searched_curvature, driver.fill, probe)
    if sampler.needs_training:
        table = with_preferences(session, table, context.bank)
    Predictions(session.space, table, session.settings.objectives).write(directory)
    return table


def _publish(
    session: Session, record: StudyRecord, results: Sequence[TrialResult], spent: Spent, to: Path
) -> tuple[Run, bool]:
    """The run with its front, and whether an interrupt left models unmeasured."""
    requests = shortlist(results, session.settings.objectives)
    context = report_context(session, record)
    session.progress.step(f"Measuring {len(requests)} models on report tokens")
    with closing(report_driver(session.settings, context)) as driver:
        measured, in_part = measure_on_report_tokens(requests, driver, to, session.progress)
    if in_part:
        session.progress.step(IN_PART)
    finalized = finalized_members(to)
    document = front_document(
        session, record, measured, spent,
        searched=search_damages(results, finalized), finalized=finalized,
    )  # fmt: skip
    document.write(to)
    write_provenance(to, _facts(session, record))
    write_report(to)
    return Run(to, document), in_part


def _finalized(run: Run, session: Session, record: StudyRecord) -> Run:
    """The run with its picked member rebuilt, if that is possible and better."""
    directory, document = run.directory, run.document
    try:
        member = pick(document)
        done = finalize_in(session, record, directory, document, member.id)
    except AutocompressError as error:
        _log.info("No member was finalized: %s", error)
        return run
    except KeyboardInterrupt:
        session.progress.step("interrupted: the front stays as it was measured")
        return run
    session.progress.step(f"Finalized {member.id[:8]}: {done.summary.splitlines()[-1]}")
    return Run(directory, FrontDocument.read(directory))


def _facts(session: Session, record: StudyRecord) -> dict[str, Any]:
    """What provenance says besides versions and machine."""
    splits = session.splits
    return {
        "settings": session.settings.to_json(),
        "resolved": dict(record.resolved),
        "splits": {s.name: s.digest for s in (splits.calibration, splits.search, splits.report)},
    }


def study_record(session: Session, old: StudyRecord | None = None) -> StudyRecord:
    """What `study.yaml` holds; on a resume, what the first run resolved stays in force."""
    facts: dict[str, Any] = {
        "model_digest": session.base.digest,
        "splits_digest": session.splits.digest,
        "space_digest": session.space.digest,
        "device_digest": session.cost.profile.digest,
    }
    if old is None:
        plan = session.plan()
        report = {"dtype": session.report_dtype(plan), "batch_size": plan.batch_size}
        resolved = {**facts, **session.task.details, "forward": plan.to_json(), "report": report}
        resolved |= resolved_owl(session, plan.dtype)
        return StudyRecord(session.settings, resolved)
    for name, value in facts.items():
        was = old.resolved.get(name, value)  # runs of version 0.1 do not say the device
        if was != value:
            raise UsageError(
                "A resumed search needs the model, data, space and device profile of its first "
                f"run, but the {_INPUTS[name]} changed ({was[:12]} then, {value[:12]} now). Next "
                "step: restore it, or search into a new --out directory."
            )
    require_same_details(session.task, old.resolved, session.settings.model)
    return StudyRecord(session.settings, old.resolved)


def _run_directory(settings: SearchSettings, out: Path | None, resume: bool) -> Path:
    """The directory to write, checked but not yet created."""
    if out is None:
        if resume:
            raise UsageError("--resume needs --out: the run directory to go on with.")
        return _fresh_directory(settings)
    if out.exists() and not out.is_dir():
        raise RunDirectoryError(f"--out must be a directory, but {out} is a file.")
    # An interrupt before the first trial may have left the cache, and it alone.
    occupied = out.is_dir() and any(path.name != CACHE_FOLDER for path in out.iterdir())
    if resume and not (out / STUDY_FILE).is_file():
        raise RunDirectoryError(
            f"--resume goes on with an earlier search, but {out} holds no {STUDY_FILE}. Next "
            "step: leave --resume away to start one."
        )
    if occupied and not resume:
        raise RunDirectoryError(
            f"--out must be a new or empty directory, but {out} is not empty; nothing in it was "
            "touched. Next step: add --resume to go on with it, or name another directory."
        )
    return out


def _fresh_directory(settings: SearchSettings) -> Path:
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(settings.model).name).strip("-").lower()
    space = Path(settings.space).stem
    for number in range(1, 10_000):
        path = Path("results") / (f"{name}-{space}" + (f"-{number}" if number > 1 else ""))
        if not path.exists():
            return path
    raise RunDirectoryError("results/ is full of runs of this name. Next step: give --out.")


def _write(record: StudyRecord, directory: Path) -> None:
    try:
        record.write(directory)
    except OSError as error:
        raise RunDirectoryError(
            f"The run directory {directory} cannot be written ({error.strerror or error}). Next "
            "step: free some space, or name another --out directory."
        ) from error
