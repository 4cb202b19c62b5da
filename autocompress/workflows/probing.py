"""The probe of a search: slopes of the base model's loss on search tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from autocompress.core import digest
from autocompress.evaluate import TaskLoss
from autocompress.models.slopes import Slopes, collect_slopes
from autocompress.search import TrialContext
from autocompress.search.probe import ErrorsOf, Probe, draws_of
from autocompress.workflows.session import EXACT_DTYPE, Session

_BUDGET_BYTES = 2 << 30
_SHARES_OF_A_GPU = 4


def search_probe(session: Session, context: TrialContext) -> Probe:
    """How slopes on the search tokens are measured, in the dtype of search-time forwards."""
    split, seed = session.splits.search, session.settings.seed
    draws = draws_of(len(split))
    module = _module(session, context)
    dtype = str(next(module.parameters()).dtype)

    def measure(n_errors: Mapping[str, int], errors: ErrorsOf) -> Slopes:
        about = f"{split.n_tokens:,} search tokens"
        session.progress.step(f"Differentiating along every option on {about}, {draws} times")
        return collect_slopes(
            module,
            session.base.layout,
            session.task.curvature_batches(split, 1),
            TaskLoss(session.task),
            n_errors=n_errors,
            errors=errors,
            draws=draws,
            seed=seed,
            memory_budget_bytes=_budget(context.device),
            progress=session.progress.advance,
        )

    facts = ["slopes", 1, session.base.digest, split.digest, dtype, draws, seed]
    return Probe(measure, digest([*facts, *session.task.facts]))


def _module(session: Session, context: TrialContext) -> nn.Module:
    """The one that trials run; in float32 where those are in float16, which gradients overflow."""
    dtype = next(context.module.parameters()).dtype
    return session.compute_module(EXACT_DTYPE) if dtype == torch.float16 else context.module


def _budget(device: torch.device) -> int:
    """Bytes for errors and gradients: on a GPU a share of what is free there."""
    if device.type != "cuda":
        return _BUDGET_BYTES
    free: int = torch.cuda.mem_get_info(device)[0]
    return free // _SHARES_OF_A_GPU
