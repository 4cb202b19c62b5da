"""The probe of a search: slopes of the base model's loss on search tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from autocompress.core import digest
from autocompress.core.errors import UsageError
from autocompress.evaluate import TaskLoss
from autocompress.models.slopes import ErrorsOf, Slopes, collect_slopes
from autocompress.search.memory import enough_memory
from autocompress.search.probe import Probe, draws_of
from autocompress.workflows.session import EXACT_DTYPE, Session

_log = logging.getLogger(__name__)

_BUDGET_BYTES = 4 << 30
_SHARES_OF_A_GPU = 4
_STAY = "Predictions stay those of the calibration tokens"


def search_probe(
    session: Session, resident: nn.Module | None = None, *, empirical: bool = False
) -> Probe:
    """How slopes on the search tokens are measured.

    Args:
        session: of the base model.
        resident: the base model in the dtype of search-time forwards; never written. Without one,
            or with one in float16, which gradients overflow, it is loaded in float32 when slopes
            are measured.
        empirical: take the data's labels instead of labels sampled from the model.
    """
    split, seed = session.splits.search, session.settings.seed
    device, forward_dtype = torch.device(session.settings.device), torch.float32
    if resident is not None:
        forward_dtype = next(resident.parameters()).dtype
    if forward_dtype == torch.float16:
        resident, forward_dtype = None, torch.float32
    draws = 1 if empirical else draws_of(len(split))

    def measure(n_errors: Mapping[str, int], errors: ErrorsOf) -> Slopes | None:
        about = f"{draws} x {split.n_tokens:,} search tokens"
        session.progress.step(f"Differentiating along every option on {about}")
        need = "Differentiating takes the model, its activations, and errors of layers at once"
        try:
            with enough_memory(session.settings.device, need):
                return collect_slopes(
                    session.compute_module(EXACT_DTYPE) if resident is None else resident,
                    session.base.layout,
                    session.task.curvature_batches(split, 1),
                    TaskLoss(session.task, empirical),
                    n_errors=n_errors,
                    errors=errors,
                    draws=draws,
                    seed=seed,
                    memory_budget_bytes=_budget(device),
                    progress=session.progress.advance,
                )
        except UsageError as error:  # a search can do without
            _log.warning("%s. %s", _STAY, error)
            return None

    facts = [session.base.digest, split.digest, str(forward_dtype), draws, seed, empirical]
    return Probe(measure, digest(["slopes", 3, *facts, *session.task.facts]))


def _budget(device: torch.device) -> int:
    """Bytes for errors that are kept."""
    if device.type != "cuda":
        return _BUDGET_BYTES
    return torch.cuda.get_device_properties(device).total_memory // _SHARES_OF_A_GPU
