"""What a worker holds resident: everything that its trials share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from autocompress.bank import Bank
from autocompress.cost.model import CostModel
from autocompress.evaluate.splits import Split
from autocompress.evaluate.task import Reference, Task
from autocompress.models.layout import ModelLayout


@dataclass(frozen=True, slots=True)
class TrialContext:
    """The base model, its bank, and the tokens that every trial is measured on.

    Attributes:
        module: the base model in the dtype of search-time forwards; shared, never written.
        layout: its layers.
        bank: packed tensors of layer × option.
        task: scores a model.
        split: search tokens.
        reference: the base model's outputs on them.
        cost: resources of an allocation.
        batch_size: sequences per forward.
        noise: typical error of the damage due to the forward's dtype (`ForwardPlan.noise`).
        retained_noise: the same of the retained quality.
        threads: torch threads per worker.
    """

    module: nn.Module
    layout: ModelLayout
    bank: Bank
    task: Task
    split: Split
    reference: Reference
    cost: CostModel
    batch_size: int
    noise: float = 0.0
    threads: int = 1
    retained_noise: float = 0.0

    @property
    def device(self) -> torch.device:
        """Where the base model lives."""
        return next(self.module.parameters()).device
