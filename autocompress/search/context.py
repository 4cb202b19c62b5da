"""What a worker holds resident: everything that its trials share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import nn

from autocompress.bank import Bank
from autocompress.cost.model import CostModel
from autocompress.evaluate.splits import Split
from autocompress.evaluate.task import Reference, Task
from autocompress.models.layout import ModelLayout
from autocompress.models.prefix import DEFAULT_PREFIX_BYTES, PrefixCache
from autocompress.search.racing import Racing


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive sequences of a split, with the base model's outputs on them."""

    split: Split
    reference: Reference


@dataclass(frozen=True, slots=True)
class Rung:
    """One stretch of a race.

    Attributes:
        new: the sequences that are run now.
        so_far: those and all before them.
    """

    new: Piece
    so_far: Piece


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
        threads: of torch, for a forward.
        cores: of a worker, for layers that are compressed side by side.
        racing: when to stop a trial that is beaten; None measures all on the whole split.
        rungs: the split as a race runs it; see `with_racing`.
        prefix_bytes: memory for block outputs that trials share; 0 for none.
        prefix: those outputs.
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
    cores: int = 1
    retained_noise: float = 0.0
    racing: Racing | None = None
    rungs: tuple[Rung, ...] = ()
    prefix_bytes: int = DEFAULT_PREFIX_BYTES
    prefix: PrefixCache = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        prefix = PrefixCache(self.module, self.layout, self.prefix_bytes)
        object.__setattr__(self, "prefix", prefix)
        if not self.rungs:
            whole = Piece(self.split, self.reference)
            object.__setattr__(self, "rungs", (Rung(whole, whole),))

    def with_racing(self, racing: Racing) -> TrialContext:
        """A context that measures the split rung by rung; trials with a bar may stop early."""
        rungs = tuple(
            Rung(self._piece(start, end), self._piece(0, end))
            for start, end in pairwise((0, *racing.ends(len(self.split))))
        )
        return replace(self, racing=racing, rungs=rungs)

    def _piece(self, start: int, end: int) -> Piece:
        split = Split.of(self.split.name, self.split.examples[start:end])
        return Piece(split, self.task.rows(self.reference, self.split, start, end))

    @property
    def fill_threads(self) -> int:
        """Layers that a worker compresses at the same time."""
        return self.cores if self.device.type == "cpu" else 1

    @property
    def device(self) -> torch.device:
        """Where the base model lives."""
        return next(self.module.parameters()).device
