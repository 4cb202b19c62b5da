"""The probe of a search: slopes of the base model's loss on search tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from autocompress.core import digest
from autocompress.evaluate import TaskLoss
from autocompress.models.slopes import Slopes, collect_slopes
from autocompress.search.memory import enough_memory
from autocompress.search.probe import ErrorsOf, Probe, draws_of
from autocompress.workflows.session import EXACT_DTYPE, Session

_BUDGET_BYTES = 4 << 30
_SHARES_OF_A_GPU = 4


def search_probe(session: Session, module: nn.Module, *, empirical: bool = False) -> Probe:
    """How slopes on the search tokens are measured.

    Args:
        session: of the base model.
        module: the base model in the dtype of search-time forwards; never written.
        empirical: take the data's labels instead of labels sampled from the model.
    """
    split, seed = session.splits.search, session.settings.seed
    draws = 1 if empirical else draws_of(len(split))
    if next(module.parameters()).dtype == torch.float16:  # gradients overflow it
        module = session.compute_module(EXACT_DTYPE)
    first = next(module.parameters())

    def measure(n_errors: Mapping[str, int], errors: ErrorsOf) -> Slopes:
        about = f"{draws} x {split.n_tokens:,} search tokens"
        session.progress.step(f"Differentiating along every option on {about}")
        need = "Differentiating takes the model, its activations, and errors of layers at once"
        with enough_memory(session.settings.device, need):
            return collect_slopes(
                module,
                session.base.layout,
                session.task.curvature_batches(split, 1),
                TaskLoss(session.task, empirical),
                n_errors=n_errors,
                errors=errors,
                draws=draws,
                seed=seed,
                memory_budget_bytes=_budget(first.device),
                progress=session.progress.advance,
            )

    facts = [
        "slopes",
        1,
        session.base.digest,
        split.digest,
        str(first.dtype),
        draws,
        seed,
        empirical,
    ]
    return Probe(measure, digest([*facts, *session.task.facts]))


def _budget(device: torch.device) -> int:
    """Bytes for errors and gradients: on a GPU a share of what is free there."""
    if device.type != "cuda":
        return _BUDGET_BYTES
    free: int = torch.cuda.mem_get_info(device)[0]
    return free // _SHARES_OF_A_GPU
