"""What samplers that train on the model learn from it before the trials."""

from __future__ import annotations

from functools import partial

from autocompress.bank import Bank
from autocompress.evaluate import curvature_batches
from autocompress.search.build_table import bank_entries
from autocompress.search.dnas.preferences import Preference
from autocompress.search.dnas.training import train_preferences, trained_table
from autocompress.search.option_table import OptionTable
from autocompress.workflows.session import EXACT_DTYPE, Session


def with_preferences(session: Session, table: OptionTable, bank: Bank) -> OptionTable:
    """The option table with preferences of a training pass, kept in the session's cache.

    Raises:
        UsageError: the space cannot be trained on this model; see `train_preferences`.
    """
    return trained_table(
        table,
        partial(_train, session, table, bank),
        facts=[
            session.base.digest,
            session.splits.calibration.digest,
            session.space.digest,
            session.task.name,
            *session.task.facts,
            session.settings.seed,
            session.settings.objectives.main,
            *bank_entries(bank, session.space),
        ],
        cache=session.cache / "training",
    )


def _train(session: Session, table: OptionTable, bank: Bank) -> tuple[Preference, ...]:
    session.progress.step("Training distributions over the options of each choice")
    module = session.compute_module(EXACT_DTYPE)
    dtype = next(module.parameters()).dtype
    return train_preferences(
        module,
        session.base.layout,
        session.space,
        table,
        task=session.task,
        batches=curvature_batches(session.task, module, session.splits.calibration),
        dense=lambda name, scheme: bank.dense(name, scheme, dtype),
        seed=session.settings.seed,
        resource=session.settings.objectives.main,
        progress=session.progress.advance,
    )
