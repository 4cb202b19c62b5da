"""Layer statistics of a compressed prefix: block by block, with all earlier blocks compressed.

A layer of a compressed model reads what compressed layers put out. Its H is therefore gathered
with every earlier block already compressed, as GPTQ does (Frantar et al. 2023, arXiv 2210.17323,
section 4). Blocks that are done are not run again: in their place stands what the last of them put
out for the batch, so the model's own code runs unchanged, whatever it does around its blocks
(masks, positions, an encoder and a decoder), and needs no replay of its own. Each block runs twice
per batch, once to be observed and once compressed; what is resident is the model, the hidden
states of the calibration tokens at one block boundary (of each stack), and one block's sums.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.core import LayerSpec
from autocompress.core.errors import ModelError
from autocompress.models.block_runs import BasePrefix, BlockRun, Prefix, TokenWeights
from autocompress.models.calibration import (
    Batch,
    LayerInput,
    second_moment,
    token_rows,
    wanted_inputs,
)
from autocompress.models.experts import expert_of, routed_to
from autocompress.models.layout import ModelLayout
from autocompress.models.statistics import Progress, StatisticsStore
from autocompress.models.streams import TokenMasks, encoder_prefix
from autocompress.models.weights import overridden

Tune = Callable[[Sequence[LayerSpec], BlockRun], Mapping[str, Tensor]]
"""From the compressed layers of a block, and the block, to other matrices of them by name."""


def collect_sequential_statistics(
    module: nn.Module,
    layout: ModelLayout,
    batches: Sequence[Batch],
    store: StatisticsStore,
    *,
    layers: Collection[str],
    compressed: Callable[[LayerSpec], Tensor],
    token_weights: TokenWeights | None = None,
    tune: Tune | None = None,
    progress: Progress | None = None,
) -> None:
    """Collect the statistics of compressed layers' inputs, each with all earlier blocks compressed.

    Embeddings are compressed from the start: their statistics, if a tied head has any, are the
    caller's business. What follows the blocks (a head, a pooler) sees all of them compressed.
    Inputs that the store holds already are not observed again.

    Args:
        module: the model, in evaluation mode; its weights are exchanged within, and put back.
        layout: of the model.
        batches: model inputs as the task feeds them.
        store: where results go, block by block.
        layers: names of the compressed layers.
        compressed: the (o, d) matrix of a layer in the module's dtype; asked once the store holds
            the layer's statistics.
        token_weights: weighs each token in H, e.g. by its gradient energy; None weighs all alike,
            and so do experts.
        tune: gives the compressed layers of a block, told how far its output is off; what it leaves
            out stays as `compressed` has it.
        progress: told about every forward.

    Raises:
        ModelError: an activation is not finite, a layer name is unknown, or the number of token
            weights is not that of the tokens.
        RunDirectoryError: the store cannot be written.
    """
    chosen = [layout.layer(name) for name in layers]
    tables = [layer for layer in chosen if layer.kind == "embedding"]
    others = [layer for layer in chosen if layer.kind != "embedding"]
    inputs = wanted_inputs(layout, [layer.name for layer in others])
    prefix = Prefix(module, layout, batches)
    steps = _Steps(prefix, store, token_weights, _Counter(progress, batches, len(layout.blocks)))
    base = None if tune is None else BasePrefix(module, layout, batches, tables)
    with overridden(module, layout, {t.name: compressed(t) for t in tables}), torch.no_grad():
        for index in range(len(layout.blocks)):
            steps.observe([i for i in inputs if i.block == index], index)
            here = [x for x in others if x.block == index]
            targets = None if base is None else base.outputs(index)
            with overridden(module, layout, {x.name: compressed(x) for x in here}):
                tuned: Mapping[str, Tensor] = {}
                if tune is not None and targets is not None:
                    tuned = tune(here, BlockRun(prefix, index, targets, token_weights))
                with overridden(module, layout, tuned):
                    steps.advance(index)
        steps.observe([i for i in inputs if i.block is None], None)


class _Counter:
    """Forwards done and their total: two per block, one for what follows."""

    def __init__(self, progress: Progress | None, batches: Sequence[Batch], n_blocks: int) -> None:
        self._progress = progress
        self._total = len(batches) * (2 * n_blocks + 1)
        self._done = 0

    def count(self, n: int = 1) -> None:
        self._done += n
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Steps:
    """Observing a block's inputs, and running it compressed."""

    def __init__(
        self,
        prefix: Prefix,
        store: StatisticsStore,
        token_weights: TokenWeights | None,
        counter: _Counter,
    ) -> None:
        self._prefix = prefix
        self._store = store
        self._token_weights = token_weights
        self._counter = counter
        self._masks = TokenMasks(encoder_prefix(prefix.module))

    def observe(self, inputs: Sequence[LayerInput], index: int | None) -> None:
        """Gather H of some inputs of block `index`, or of what follows the blocks."""
        missing = [item for item in inputs if item.name not in self._store]
        if not missing:
            self._counter.count(len(self._prefix.batches))
            return
        sums = [_Sum(item, self._weights_of(item)) for item in missing]
        for number, batch in enumerate(self._prefix.batches):
            with ExitStack() as hooks:
                for one in sums:
                    item = one.item
                    mask = self._masks.of(
                        item.name, batch, reads_encoder_output=item.reads_encoder_output
                    )
                    one.watch(self._prefix.module, mask, hooks)
                self._prefix.forward(number, index)
            self._counter.count()
        for one in sums:
            self._store.put(one.item.name, *one.result())

    def advance(self, index: int) -> None:
        """Run block `index` as it now is, and take what it puts out as the new boundary."""
        outputs = []
        for number in range(len(self._prefix.batches)):
            outputs.append(self._prefix.forward(number, index))
            self._counter.count()
        self._prefix.extend(index, outputs)

    def _weights_of(self, item: LayerInput) -> Tensor | None:
        # Compressed blocks send other tokens to an expert than those that weights are known of.
        if self._token_weights is None or expert_of(self._prefix.module, item.name) is not None:
            return None
        return self._token_weights(item.name)


class _Sum:
    """Running weighted sum of ``x x^T`` over one input."""

    def __init__(self, item: LayerInput, weights: Tensor | None) -> None:
        self.item = item
        self._weights = weights
        self._scales: Tensor | None = None
        if weights is not None and float(weights.max()) > 0:
            self._scales = (weights.double() / weights.double().mean()).sqrt().float()
        self._sum: Tensor | None = None
        self._n_rows = 0

    def watch(self, module: nn.Module, mask: Tensor | None, hooks: ExitStack) -> None:
        def observe(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._add(token_rows(arguments[0], mask, routed_to(module, self.item.name)))

        layer = module.get_submodule(self.item.name)
        hooks.callback(layer.register_forward_pre_hook(observe).remove)

    def _add(self, rows: Tensor) -> None:
        if self._scales is not None:
            scales = self._scales[self._n_rows : self._n_rows + len(rows)]
            self._require_as_many(len(scales), len(rows))
            rows = rows.float() * scales.to(rows.device)[:, None]
        product = second_moment(rows)
        if self._sum is None:
            self._sum = torch.zeros_like(product, dtype=torch.float64)
        self._sum += product
        self._n_rows += len(rows)

    def result(self) -> tuple[Tensor | None, int]:
        """H (d, d) float32 and the tokens with any weight; None and 0 if never seen."""
        if self._sum is None or self._n_rows == 0:
            return None, 0
        hessian = (self._sum / self._n_rows).float().cpu()
        if not bool(torch.isfinite(hessian).all()):
            raise ModelError(
                f"Activations must be finite, but the input of layer {self.item.name!r} is not "
                "once earlier blocks are compressed. Pick a milder member."
            )
        if self._scales is None or self._weights is None:
            return hessian, self._n_rows
        self._require_as_many(len(self._scales), self._n_rows)
        return hessian, int((self._weights > 0).sum())

    def _require_as_many(self, n_weights: int, n_tokens: int) -> None:
        if n_weights != n_tokens:
            raise ModelError(
                f"Every token of the input of {self.item.name!r} needs a weight, but {n_tokens} "
                f"tokens met {n_weights} weights. Are they those of other tokens?"
            )
