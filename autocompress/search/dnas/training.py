"""The training pass: logits over the options of each choice, by gradient descent.

For each trade-off weight the expected loss ``damage + weight * bytes`` is minimised over logits
alone (AQ-BERT, Zhao et al. 2021, eq. 5, its upper level; there is no inner level, as the options'
weights are those of the bank). Each step draws Gumbel noise, relaxes the draw by a softmax whose
temperature falls geometrically (DNAS, Wu et al. 2018, eq. 8), and takes the damage of the mixture
against the base model on a few calibration sequences.

A mixture of roundings damages less than any of them (their errors average out), and so misleads
while the temperature is high; it is therefore annealed until draws are nearly whole options.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.core import STORAGE, derived_seed, digest
from autocompress.core.errors import UsageError
from autocompress.core.files import write_atomically
from autocompress.evaluate import Task
from autocompress.models import ModelLayout
from autocompress.models.weights import frozen
from autocompress.search.dnas.mixture import (
    Mixture,
    mixed,
    mixtures,
    penalties,
    require_all_ran,
    usable,
)
from autocompress.search.dnas.preferences import N_TRADE_OFFS, Preference, trade_offs
from autocompress.search.option_table import OptionTable
from autocompress.search.peers.scores import Batch, Dense
from autocompress.spaces import SearchSpace

_log = logging.getLogger(__name__)

_FORMAT = "training pass 1"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Training:
    """How logits are trained.

    Attributes:
        steps: for each trade-off weight.
        sequences: of calibration in a step.
        learning_rate: of Adam.
        temperatures: of the first and the last step.
        straight_through: compute with the likeliest option of each draw, and send the gradient
            through the relaxed draw.
        lasso: of the bands of sub-group precision, over the worth of all bytes.
        n_trade_offs: weights that are trained, each from equal logits.
    """

    steps: int = 60
    sequences: int = 2
    learning_rate: float = 0.2
    temperatures: tuple[float, float] = (2.0, 0.3)
    straight_through: bool = False
    lasso: float = 0.01
    n_trade_offs: int = N_TRADE_OFFS

    def __post_init__(self) -> None:
        if min(self.steps, self.sequences, self.n_trade_offs) < 1:
            raise UsageError(
                "A training pass needs at least one step, sequence and trade-off weight, but got "
                f"{self.steps}, {self.sequences} and {self.n_trade_offs}."
            )
        if not 0 < self.temperatures[1] <= self.temperatures[0] or self.learning_rate <= 0:
            raise UsageError(
                "Temperatures must fall and stay above 0, and the learning rate be above 0, but "
                f"got {self.temperatures} and {self.learning_rate}. The usual values are "
                f"{Training().temperatures} and {Training().learning_rate}."
            )

    def temperature(self, step: int) -> float:
        """At a step, falling geometrically."""
        first, last = self.temperatures
        return float(first * (last / first) ** (step / max(1, self.steps - 1)))


DEFAULT_TRAINING = Training()


def train_preferences(
    module: nn.Module,
    layout: ModelLayout,
    space: SearchSpace,
    table: OptionTable,
    *,
    task: Task,
    batches: Sequence[Batch],
    dense: Dense,
    seed: int = 0,
    training: Training = DEFAULT_TRAINING,
    weights: Sequence[float] | None = None,
    resource: str = STORAGE,
    progress: Progress | None = None,
) -> tuple[Preference, ...]:
    """Distributions over the options of each choice, one set per trade-off weight.

    Depends on the arguments alone: each weight is trained from equal logits, with noise and
    batches drawn from the seed.

    Args:
        module: the base model, float32; left as it was, its parameters get no gradients.
        layout: of the model.
        space: what may be chosen.
        table: of the space, for costs, and for the weights if none are given.
        task: gives the damage.
        batches: of `Task.curvature_batches`, of calibration tokens; at least one.
        dense: decoded weights; of a `Bank`, for instance.
        seed: of noise and order.
        training: how.
        weights: damage that a byte is worth; by default those of `trade_offs`.
        resource: what damage is traded for instead of bytes.
        progress: told how many of all steps are done.

    Raises:
        UsageError: the space does not fit in memory, rounds inputs, or holds a layer that a
            forward pass leaves out; the task has no differentiable damage.
        ModelError: the base model does not fit the task.
    """
    if weights is None:
        weights = trade_offs(table.damage, table.cost(resource), training.n_trade_offs)
    parts = mixtures(module, layout, space, dense)
    pieces = _pieces(batches, training.sequences)
    run = _Run(
        module, task, parts, pieces=pieces, training=training, table=table, resource=resource
    )
    done, total = 0, len(weights) * training.steps
    found = []
    for weight in weights:
        for _ in run.descend(weight, seed):
            done += 1
            if progress is not None:
                progress(done, total)
        found.append(Preference(weight, run.log_probabilities()))
    return tuple(found)


class _Run:
    """Logits of all choices on the way down; padded to the most options with -inf."""

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        parts: Sequence[Sequence[Mixture]],
        *,
        pieces: Sequence[Batch],
        training: Training,
        table: OptionTable,
        resource: str,
    ) -> None:
        self._module, self._task, self._parts = module, task, parts
        self._pieces, self._training = pieces, training
        costs = table.cost(resource)
        self._sizes = [len(cost) for cost in costs]
        self._shape = (len(costs), max(self._sizes))
        self._added = torch.zeros(self._shape, dtype=torch.float64)
        self._open = torch.zeros(self._shape, dtype=torch.bool)
        for row, (cost, layers) in enumerate(zip(costs, parts, strict=True)):
            self._added[row, : len(cost)] = torch.from_numpy(cost - cost.min())
            self._open[row, : len(cost)] = usable(layers).cpu()
        self._span = float(self._added.amax(1).sum()) or 1.0
        self._device = next(module.parameters()).device
        self._logits = torch.zeros(self._shape)

    def descend(self, weight: float, seed: int) -> Iterator[None]:
        """Train for one trade-off weight, from equal logits; yields after each step."""
        training = self._training
        generator = torch.Generator().manual_seed(derived_seed("dnas", seed, repr(weight)))
        logits = torch.zeros(self._shape, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=training.learning_rate)
        order: list[int] = []
        for step in range(training.steps):
            if not order:
                order = torch.randperm(len(self._pieces), generator=generator).tolist()
            draw = self._draw(logits, training.temperature(step), generator)
            gradient = self._gradient(logits, draw, self._pieces[order.pop()], weight)
            if bool(gradient.isfinite().all()):  # a draw may break the model: nothing to learn
                logits.grad = gradient
                optimizer.step()
            yield
        self._logits = logits.detach()

    def log_probabilities(self) -> tuple[np.ndarray[Any, np.dtype[np.float64]], ...]:
        """Of the logits that the last descent reached."""
        rows = self._masked(self._logits.double()).log_softmax(1).numpy()
        return tuple(row[:size].copy() for row, size in zip(rows, self._sizes, strict=True))

    def _masked(self, logits: Tensor) -> Tensor:
        """-inf where there is no option; a choice without any usable one keeps them all."""
        closed = ~self._open & self._open.any(1, keepdim=True)
        for row, size in enumerate(self._sizes):
            closed[row, size:] = True
        return logits.masked_fill(closed, -torch.inf)

    def _draw(self, logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """A relaxed draw from the distributions (n_choices, most options), in the graph."""
        uniform = torch.rand(self._shape, dtype=torch.float64, generator=generator)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12))).float()
        soft = ((self._masked(logits) + gumbel) / temperature).softmax(1)
        if not self._training.straight_through:
            return soft
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        return hard + soft - soft.detach()

    def _gradient(self, logits: Tensor, draw: Tensor, batch: Batch, weight: float) -> Tensor:
        """Of the loss of a draw by the logits, the loss in units of the worth of all bytes."""
        task = self._task
        with torch.no_grad():
            base = task.answers(self._module, batch)
        rows = draw.to(self._device)
        chosen = [row[:size] for row, size in zip(rows, self._sizes, strict=True)]
        with (
            torch.enable_grad(),
            frozen(self._module),
            mixed(self._module, self._parts, chosen) as ran,
        ):
            answers = task.answers(self._module, batch)
            damage = task.divergence(answers, base) / task.n_scored(batch)
            require_all_ran(self._parts, ran)
            worth = weight * self._span or 1.0
            size = (draw.double() * self._added).sum() / self._span
            lasso = self._training.lasso * penalties(self._parts, chosen)
            loss = damage.double().cpu() / worth + (size + lasso.double().cpu())
            return torch.autograd.grad(loss, logits)[0]


def _pieces(batches: Sequence[Batch], sequences: int) -> list[Batch]:
    """The batches, cut along their first axis."""
    return [
        {name: tensor[start : start + sequences] for name, tensor in batch.items()}
        for batch in batches
        for start in range(0, len(next(iter(batch.values()))), sequences)
    ]


def trained_table(
    table: OptionTable,
    train: Callable[[], tuple[Preference, ...]],
    *,
    facts: Sequence[Any],
    training: Training = DEFAULT_TRAINING,
    cache: Path | None = None,
) -> OptionTable:
    """The table with preferences: those of an earlier pass over the same things, or of a new one.

    Args:
        table: of the space.
        train: makes them.
        facts: besides the table and `training`, all that they depend on, as JSON.
        training: how.
        cache: folder of finished passes; None to train anew. One that cannot be read is trained
            again, one that cannot be written is returned all the same, each with a warning.
    """
    key = digest([_FORMAT, table.digest, asdict(training), *facts])
    path = None if cache is None else cache / f"{key}.json"
    found = None if path is None else _read(path)
    if found is None:
        found = train()
        if path is not None:
            _write(path, found)
    return replace(table, preferences=found)


def _read(path: Path) -> tuple[Preference, ...] | None:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["preferences"]
        return tuple(map(Preference.from_json, rows))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("The training pass %s is damaged and is done again: %s.", path, error)
        return None


def _write(path: Path, found: Sequence[Preference]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"preferences": [p.to_json() for p in found]}))
    except OSError as error:
        _log.warning("The training pass %s cannot be kept: %s.", path, error)
