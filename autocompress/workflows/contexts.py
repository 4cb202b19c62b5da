"""What trials share, for searching and for reporting, and the drivers that run them."""

from __future__ import annotations

from dataclasses import replace

from autocompress.core.machine import usable_cores
from autocompress.drivers.local import LocalDriver
from autocompress.evaluate import ForwardPlan, Split
from autocompress.search import DEFAULT_RACING, TrialContext
from autocompress.search.driver import Driver
from autocompress.workflows.session import Session
from autocompress.workflows.settings import SearchSettings, StudyRecord


def search_context(session: Session, record: StudyRecord) -> TrialContext:
    """What the trials of a search share: search tokens, rung by rung."""
    plan = ForwardPlan.from_json(record.resolved["forward"])
    context = _context(session, session.splits.search, plan, plan.dtype)
    return context.with_racing(DEFAULT_RACING)


def report_context(session: Session, record: StudyRecord) -> TrialContext:
    """What the measurements of a front share: report tokens, all of them for every model."""
    plan = ForwardPlan.from_json(record.resolved["forward"])
    dtype = record.resolved["report"]["dtype"]
    context = _context(session, session.splits.report, plan, dtype)
    return replace(context, prefix_bytes=0)  # members of a front start alike too rarely


def _context(session: Session, split: Split, plan: ForwardPlan, dtype: str) -> TrialContext:
    """What trials on `split` share, the base model's outputs on it among them."""
    module = session.compute_module(dtype)
    cores = usable_cores()
    noisy = dtype == plan.dtype  # the plan knows the noise of its own dtype
    return TrialContext(
        module=module,
        layout=session.base.layout,
        bank=session.bank(plan.dtype),
        task=session.task,
        split=split,
        reference=session.reference(module, split, plan.batch_size),
        cost=session.cost,
        batch_size=plan.batch_size,
        noise=plan.noise if noisy else 0.0,
        retained_noise=plan.retained_noise if noisy else 0.0,
        threads=plan.threads_on(cores),
        cores=cores,
    )


def make_driver(settings: SearchSettings, context: TrialContext) -> Driver:
    """The driver that the settings name."""
    if settings.driver == "local":
        return LocalDriver(context)
    from autocompress.drivers.ray import RayDriver  # slow to import

    return RayDriver(
        context,
        workers=settings.workers,
        gpus_per_worker=settings.gpus_per_worker,
        address=settings.address,
        trial_timeout_seconds=settings.trial_timeout_seconds,
    )


def report_driver(settings: SearchSettings, context: TrialContext) -> Driver:
    """On CPUs this process with all its cores: starting workers again would cost more."""
    return LocalDriver(context) if settings.device == "cpu" else make_driver(settings, context)
