"""The bank that a finalized member is rebuilt from: statistics with all earlier blocks compressed.

They live in the run's cache under a name that says what they depend on; whoever finds them missing
gathers them again, in the same way.
"""

from __future__ import annotations

from torch import Tensor

from autocompress.bank import Bank
from autocompress.core import Allocation, LayerSpec, digest
from autocompress.methods import LayerStatistics, shares, strongest
from autocompress.models import ModelLayout, StatisticsStore
from autocompress.models.curvature_pass import TEMPERING
from autocompress.models.sequential import TokenWeights, collect_sequential_statistics
from autocompress.workflows.session import CALIBRATION_BATCH, Session

FOLDER = "sequential"


def strongest_allocation(layout: ModelLayout, allocation: Allocation) -> Allocation:
    """The allocation by the strongest methods that store as much; embeddings stay as they are.

    An embedding is read before anything is compressed, so it has nothing to gain.
    """
    schemes = {}
    for name, scheme in allocation.items():
        layer = layout.layer(name)
        schemes[name] = scheme if layer.kind == "embedding" else strongest(layer, scheme)
    return Allocation.of(schemes)


def statistics_name(session: Session, base: Bank, searched: Allocation) -> str:
    """What the sequential statistics of an allocation depend on, as one name.

    Args:
        session: gives the calibration tokens.
        base: the bank of the search; its entries are named by weights, statistics and code.
        searched: the allocation as the search measured it.
    """
    entries = [[name, base.path(name, scheme).stem] for name, scheme in searched.items()]
    weighting = session.settings.token_weighting
    facts = ["sequential statistics", 2, session.splits.calibration.digest, weighting]
    return digest([*facts, entries])


def sequential_statistics(session: Session, name: str) -> StatisticsStore:
    """The store of that name in the run's cache; it may be empty."""
    return StatisticsStore(session.cache / FOLDER / name)


def rebuilt_bank(session: Session, base: Bank, dtype: str, rebuilt: Allocation, name: str) -> Bank:
    """A bank over the same directory that compresses with sequential statistics.

    Args:
        session: gives model and calibration tokens.
        base: the bank of the search; embeddings, and layers that share, are compressed with its
            statistics.
        dtype: of the forwards that statistics come from.
        rebuilt: the allocation that is compressed, block after block.
        name: of the statistics; those that are missing in the cache are gathered now.

    Raises:
        ModelError: activations of the compressed model are not finite.
        RunDirectoryError: the cache cannot be written.
    """
    store = sequential_statistics(session, name)

    def as_searched(layer: LayerSpec) -> bool:
        """Layers that share are of several blocks: no prefix is compressed before all of them."""
        return layer.kind == "embedding" or shares(rebuilt.scheme(layer.name))

    def statistics(layer: LayerSpec) -> LayerStatistics:
        return base.statistics(layer) if as_searched(layer) else store.get(layer)

    bank = base.with_statistics(statistics)
    layers = map(session.base.layout.layer, rebuilt)
    inputs = {layer.input_name for layer in layers if not as_searched(layer)} - {None}
    if all(name in store for name in inputs):
        return bank
    session.progress.step(f"Rebuilding {len(rebuilt)} layers block by block")
    module = session.compute_module(dtype)
    weight = next(module.parameters())

    def compressed(layer: LayerSpec) -> Tensor:
        return bank.dense(layer.name, rebuilt[layer.name], weight.dtype)

    collect_sequential_statistics(
        module,
        session.base.layout,
        session.task.batches(session.splits.calibration, CALIBRATION_BATCH),
        store,
        layers=list(rebuilt),
        compressed=compressed,
        token_weights=_token_weights(session),
        progress=session.progress.advance,
    )
    return bank


def _token_weights(session: Session) -> TokenWeights | None:
    """How tokens count: as they did when the search compressed its layers."""
    if session.settings.token_weighting == "none":
        return None
    store = session.searched_curvature
    readers = {layer.input_name: layer for layer in session.base.layout.layers}

    def weights(input_name: str) -> Tensor:
        return store.energies(readers[input_name]) ** TEMPERING

    return weights
