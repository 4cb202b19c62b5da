"""The bank that a finalized member is rebuilt from: statistics with all earlier blocks compressed.

They live in the run's cache under a name that says what they depend on; whoever finds them missing
gathers them again, in the same way. So do layers whose scales were tuned over their block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from autocompress.bank import Bank
from autocompress.bank.entries import checksum
from autocompress.core import Allocation, LayerSpec, Scheme, digest
from autocompress.methods import (
    LayerStatistics,
    canonical,
    decode,
    is_tunable,
    shares,
    strongest,
)
from autocompress.models import ModelLayout, StatisticsStore
from autocompress.models.block_runs import BlockRun, TokenWeights
from autocompress.models.block_tuning import FIRST_STEP, ROUNDING_STEP, tune_block
from autocompress.models.curvature_pass import TEMPERING
from autocompress.models.sequential import collect_sequential_statistics
from autocompress.workflows.reach import CALIBRATION_BATCH
from autocompress.workflows.session import Session
from autocompress.workflows.tuned import TunedLayers

FOLDER = "sequential"
TUNED_FOLDER = "tuned"
BLOCK_STEPS = 0
"""Steps of block tuning by default."""


def strongest_allocation(layout: ModelLayout, allocation: Allocation) -> Allocation:
    """The allocation by the strongest methods that store as much; embeddings stay as they are.

    An embedding is read before anything is compressed, so its statistics would be the same; and
    stronger methods take many times as long, and several copies in memory, of a vocabulary.
    """
    schemes = {}
    for name, scheme in allocation.items():
        layer = layout.layer(name)
        schemes[name] = scheme if layer.kind == "embedding" else strongest(layer, scheme)
    return Allocation.of(schemes)


def statistics_name(session: Session, base: Bank, searched: Allocation, block_steps: int) -> str:
    """What the sequential statistics of an allocation depend on, as one name.

    Args:
        session: gives the calibration tokens and the task.
        base: the bank of the search; its entries are named by weights, statistics and code.
        searched: the allocation as the search measured it.
        block_steps: of block tuning; 0 for none.
    """
    entries = [[name, base.path(name, scheme).stem] for name, scheme in searched.items()]
    weighting = session.settings.token_weighting
    facts = ["sequential statistics", 2, session.splits.calibration.digest, weighting]
    facts += session.task.facts
    tuning = ["block tuning", 2, block_steps, FIRST_STEP, ROUNDING_STEP] if block_steps else []
    return digest([*facts, *tuning, entries])


def sequential_statistics(session: Session, name: str) -> StatisticsStore:
    """The store of that name in the run's cache; it may be empty."""
    return StatisticsStore(session.cache / FOLDER / name)


def rebuilt_digest(session: Session, bank: Bank, name: str) -> str:
    """Of the content of all that a rebuilt bank's layers come from.

    Args:
        session: whose cache holds the statistics.
        bank: as `rebuilt_bank` gave it.
        name: of the statistics.
    """
    found = sequential_statistics(session, name).digest
    if not bank.given:
        return found
    tuned = sorted([layer, checksum(entry.tensors)] for layer, entry in bank.given.items())
    return digest([found, tuned])


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a member is rebuilt.

    Attributes:
        allocation: of the strongest methods.
        statistics: name of the sequential statistics, see `statistics_name`.
        block_steps: of gradient descent on scales and rounding of each block; 0 for none.
    """

    allocation: Allocation
    statistics: str
    block_steps: int = BLOCK_STEPS


def rebuilt_bank(session: Session, base: Bank, dtype: str, recipe: Recipe) -> Bank:
    """A bank over the same directory that compresses with sequential statistics.

    Statistics and tuned layers that are missing in the cache are made now.

    Args:
        session: gives model and calibration tokens.
        base: the bank of the search; embeddings, and layers that share, are compressed with its
            statistics.
        dtype: of the forwards that statistics come from.
        recipe: what is compressed, block after block, and how.

    Raises:
        ModelError: activations of the compressed model are not finite.
        RunDirectoryError: the cache cannot be written.
    """
    store = sequential_statistics(session, recipe.statistics)

    def as_searched(layer: LayerSpec) -> bool:
        """Layers that share are of several blocks: no prefix is compressed before all of them."""
        return layer.kind == "embedding" or shares(recipe.allocation.scheme(layer.name))

    def statistics(layer: LayerSpec) -> LayerStatistics:
        return base.statistics(layer) if as_searched(layer) else store.get(layer)

    work = _Rebuilding(session, base.with_statistics(statistics), dtype, recipe)
    layers = [session.base.layout.layer(name) for name in recipe.allocation]
    inputs = {layer.input_name for layer in layers if not as_searched(layer)} - {None}
    wanted = work.tunable(layers)
    if not (all(name in store for name in inputs) and work.tuned.holds(wanted)):
        session.progress.step(f"Rebuilding {len(layers)} layers block by block")
        work.run(store)
    return work.bank.with_given(work.tuned.all(wanted))


class _Rebuilding:
    """Compresses block after block, and tunes each if the recipe says so."""

    def __init__(self, session: Session, bank: Bank, dtype: str, recipe: Recipe) -> None:
        self.bank = bank
        self.tuned = TunedLayers(session.cache / TUNED_FOLDER / recipe.statistics)
        self._session, self._dtype, self._recipe = session, dtype, recipe

    def tunable(self, layers: Sequence[LayerSpec]) -> dict[str, Scheme]:
        """Schemes of the layers that are tuned, by name: codes on a grid, in a block."""
        schemes = self._recipe.allocation
        return {
            layer.name: canonical(schemes[layer.name])
            for layer in layers
            if self._recipe.block_steps
            and layer.block is not None
            and layer.kind != "embedding"
            and not shares(schemes[layer.name])
            and is_tunable(schemes[layer.name])
        }

    def run(self, store: StatisticsStore) -> None:
        """Fill `store`, and `tuned` if blocks are tuned."""
        session, recipe = self._session, self._recipe
        module = session.compute_module(self._dtype)
        weight = next(module.parameters())

        def compressed(layer: LayerSpec) -> Tensor:
            return self.bank.dense(layer.name, recipe.allocation[layer.name], weight.dtype)

        collect_sequential_statistics(
            module,
            session.base.layout,
            session.task.batches(session.splits.calibration, CALIBRATION_BATCH),
            store,
            layers=list(recipe.allocation),
            compressed=compressed,
            token_weights=_token_weights(session),
            tune=partial(self._tune, weight) if recipe.block_steps else None,
            progress=session.progress.advance,
        )

    def _tune(
        self, weight: nn.Parameter, layers: Sequence[LayerSpec], run: BlockRun
    ) -> Mapping[str, Tensor]:
        """Matrices of the layers of a block after tuning; `weight` has their device and dtype."""
        wanted = self.tunable(layers)
        if not self.tuned.holds(wanted):
            packed = {n: self.bank.packed(n, s).to(weight.device) for n, s in wanted.items()}
            base = {n: self._session.weights[n].to(weight.device) for n in wanted}
            steps = self._recipe.block_steps
            self.tuned.put(tune_block(run, packed, base, steps=steps, dtype=weight.dtype).layers)
        found = {n: entry.to(weight.device) for n, entry in self.tuned.all(wanted).items()}
        return {n: decode(e.tensors, e.scheme, e.shape, weight.dtype) for n, e in found.items()}


def _token_weights(session: Session) -> TokenWeights | None:
    """How tokens count: as they did when the search compressed its layers."""
    if session.settings.token_weighting == "none":
        return None
    store = session.searched_curvature
    readers = {layer.input_name: layer for layer in session.base.layout.layers}

    def weights(input_name: str) -> Tensor:
        return store.energies(readers[input_name]) ** TEMPERING

    return weights
