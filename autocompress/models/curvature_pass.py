"""One forward and backward per calibration batch: the curvature of every layer at once.

Weights are frozen. The first watched layer of a forward makes its output the start of the graph, so
gradients go to layer outputs only and backward stops there; windows of inputs keep the accumulators
within a budget, as in `collect_statistics`. Gradients are reduced to sums of squares as they come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from autocompress.core import LayerSpec, derived_seed
from autocompress.core.errors import ModelError
from autocompress.models.calibration import (
    Batch,
    LayerInput,
    layers_in_words,
    second_moment,
    sequence_rows,
    wanted_inputs,
    windows,
)
from autocompress.models.curvature import CurvatureStore, InputCurvature, Lookup, lookup_name
from autocompress.models.curvature_rows import SequenceRows
from autocompress.models.experts import routed_to
from autocompress.models.layout import ModelLayout, kind_of
from autocompress.models.reads import require_shared, sharing, watched_reads
from autocompress.models.streams import TokenMasks, encoder_prefix
from autocompress.models.weights import frozen

_log = logging.getLogger(__name__)

_ACCUMULATORS = 2  # H for damages, H for methods

TEMPERING = 0.5
"""Power of a token's gradient energy that weighs it in the statistics for methods.

1 follows the damage best on the calibration tokens, but energies are so unequal that it rests on a
hundred of eight thousand tokens, and error compensation then fits their noise; 0 is the plain
second moment. Measured on a 22M-parameter sentence encoder at 3 bits: damage 0.0397 for 1, 0.0335
for 1/2, 0.0381 for 0 (0.0399 with tokens coupled).
"""

Loss = Callable[[nn.Module, Batch, torch.Generator], tuple[Tensor, int]]
"""Runs the module on a batch; gives a scalar in the graph, and the units that it sums over."""

Progress = Callable[[int, int], None]

_Cut = Callable[..., list[Tensor]]


def collect_curvature(
    module: nn.Module,
    layout: ModelLayout,
    batches: Sequence[Batch],
    loss: Loss,
    store: CurvatureStore,
    *,
    layers: Collection[str] | None = None,
    coupled: bool = True,
    seed: int = 0,
    memory_budget_bytes: int = 2 << 30,
    progress: Progress | None = None,
) -> None:
    """Collect the curvature that the store lacks.

    Rows are tokens as in `collect_statistics`. The labels of a batch depend on the seed and its
    place alone, so the result does not depend on the windows.

    Args:
        module: the model, in evaluation mode, float32 or wider for gradients that do not vanish.
        layout: of the model.
        batches: model inputs, padded, with what `loss` reads besides.
        loss: e.g. `evaluate.TaskLoss`.
        store: where results go; what it holds already is not collected again.
        layers: names of the layers that are wanted; None for all.
        coupled: an error hits all tokens of a sequence alike, and their damages add up before they
            are squared; False takes every token for itself.
        seed: of the sampled labels.
        memory_budget_bytes: for accumulators; at least one input is always handled at a time.
        progress: told about every batch done, and their total over all windows.

    Raises:
        ModelError: an activation or a gradient is not finite; a layer name is unknown; layers of
            one input read different tensors.
        RunDirectoryError: the store cannot be written.
    """
    wanted, tables = _missing(layout, store, layers)
    parts = list(windows(wanted, memory_budget_bytes // _ACCUMULATORS))
    if tables and not parts:
        parts = [[]]
    masks = TokenMasks(encoder_prefix(module))
    done, total = 0, len(parts) * len(batches)
    unreached: list[str] = []
    for part in parts:
        observer = _Observer(module, layout, part, tables, masks=masks, coupled=coupled)
        for index, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(derived_seed("curvature", seed, index))
            observer.observe(batch, loss, generator)
            done += 1
            if progress is not None:
                progress(done, total)
        unreached += observer.write(store)
        tables = []
    if unreached:
        _log.warning(
            "No gradient reached %s in calibration: errors there count as harmless.",
            layers_in_words(unreached),
        )


def holds_curvature(
    store: CurvatureStore, layout: ModelLayout, layers: Collection[str] | None = None
) -> bool:
    """Whether `collect_curvature` would find all of these layers in the store, and undamaged."""
    return not any(_missing(layout, store, layers))


def _missing(
    layout: ModelLayout, store: CurvatureStore, layers: Collection[str] | None
) -> tuple[list[LayerInput], list[LayerSpec]]:
    """Distinct inputs, and embeddings as tables, that the store lacks or holds damaged."""
    wanted = [item for item in wanted_inputs(layout, layers) if not store.is_sound(item.name)]
    return wanted, [t for t in _tables(layout, layers) if not store.is_sound(lookup_name(t))]


def _tables(layout: ModelLayout, layers: Collection[str] | None) -> list[LayerSpec]:
    return [
        layer
        for layer in layout.layers
        if layer.kind == "embedding" and (layers is None or layer.name in layers)
    ]


class _Observer:
    """Everything that one window watches."""

    def __init__(
        self,
        module: nn.Module,
        layout: ModelLayout,
        window: Sequence[LayerInput],
        tables: Sequence[LayerSpec],
        *,
        masks: TokenMasks,
        coupled: bool,
    ) -> None:
        device = next(module.parameters()).device
        self._module = module
        self._layout = layout
        self._masks = masks
        self._inputs = [
            _WatchedInput(
                item, [s for s in layout.layers if s.input_name == item.name], device, coupled
            )
            for item in window
        ]
        self._tables = [_WatchedTable(table, device, coupled) for table in tables]
        names = {item.name for item in window}
        self._sharing = [layer for layer in sharing(layout) if layer.input_name in names]
        self._n_units = 0

    def observe(self, batch: Batch, loss: Loss, generator: torch.Generator) -> None:
        device = next(self._module.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with frozen(self._module), torch.enable_grad(), ExitStack() as hooks:
            reads = hooks.enter_context(watched_reads(self._module, self._layout, self._sharing))
            for watched in self._inputs:
                item = watched.item
                mask = self._masks.of(
                    item.name, inputs, reads_encoder_output=item.reads_encoder_output
                )
                rows = partial(sequence_rows, mask=mask, n_sequences=_n_sequences(inputs))
                watched.hook(self._module, rows, hooks)
            for table in self._tables:
                table.hook(self._module, _n_sequences(inputs), hooks)
            value, n_units = loss(self._module, inputs, generator)
            require_shared(self._layout, reads)
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
        self._n_units += n_units
        for watched in self._inputs:
            watched.end_batch()

    def write(self, store: CurvatureStore) -> list[str]:
        """Names of the inputs that no gradient reached."""
        unreached = []
        for watched in self._inputs:
            found = watched.result(self._n_units)
            store.put(watched.item.name, found)
            if found.hessian is None:
                unreached.append(watched.item.name)
        for table in self._tables:
            store.put_lookup(table.layer, table.result(self._n_units))
        return unreached


def _n_sequences(inputs: Batch) -> int:
    return len(next(iter(inputs.values())))


class _WatchedInput:
    """Running sums about one input and the layers that read it."""

    def __init__(
        self, item: LayerInput, readers: Sequence[LayerSpec], device: torch.device, coupled: bool
    ) -> None:
        self.item = item
        self._readers = readers
        self._coupled = coupled
        self._weighted = torch.zeros(item.width, item.width, dtype=torch.float64, device=device)
        self._statistics = torch.zeros_like(self._weighted)
        self._weight = 0.0
        self._energies: list[Tensor] = []
        self._rows: dict[str, Tensor] = {}
        self._calls: list[_Call] = []

    def hook(self, module: nn.Module, rows: _Cut, hooks: ExitStack) -> None:
        def keep_input(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            cut = partial(rows, routed=routed_to(module, self.item.name))
            parts = [SequenceRows(part, self._coupled) for part in cut(arguments[0].detach())]
            self._calls.append(_Call(cut, parts))

        handle = module.get_submodule(self.item.name).register_forward_pre_hook(keep_input)
        hooks.callback(handle.remove)
        for reader in self._readers:
            _watch_output(_multiplying(module, reader), hooks, self._taker(reader))

    def _taker(self, reader: LayerSpec) -> Callable[[int, Tensor], None]:
        def take(call: int, gradient: Tensor) -> None:
            known = self._calls[call]
            pairs = zip(known.sequences, known.cut(gradient), strict=True)
            found = torch.stack([sequence.take(part) for sequence, part in pairs]).sum(0)
            self._rows[reader.name] = self._rows.get(reader.name, 0) + found

        return take

    def end_batch(self) -> None:
        for sequence in (s for call in self._calls for s in call.sequences):
            energies = sequence.gram.diagonal()
            weights = energies**TEMPERING
            scaled = sequence.rows * weights.sqrt()[:, None]
            self._statistics += second_moment(scaled)
            self._weight += float(weights.sum(dtype=torch.float64))
            largest, product = sequence.weighted()
            self._weighted.add_(product, alpha=largest)
            self._energies.append(energies.float().cpu())
        self._calls.clear()

    def result(self, n_units: int) -> InputCurvature:
        energies = torch.cat(self._energies) if self._energies else torch.zeros(0)
        total = float(energies.double().sum())
        hessian = None if total == 0 else (self._weighted / total).float().cpu()
        statistics = None if total == 0 else (self._statistics / self._weight).float().cpu()
        # of a coupled sequence, `take` gives the trace of f_r H
        scale = n_units * (float(self._weighted.trace()) / total if self._coupled and total else 1)
        nothing = torch.zeros(())
        rows = {
            reader.name: (self._rows.get(reader.name, nothing).cpu() / (scale or 1))
            .float()
            .expand(reader.out_features)
            .contiguous()
            for reader in self._readers
        }
        _require_finite(self.item.name, hessian, statistics, *rows.values())
        return InputCurvature(hessian, statistics, energies, rows)


@dataclass(frozen=True, slots=True)
class _Call:
    """One run of a layer: how rows are cut into sequences, and its inputs cut like that."""

    cut: _Cut
    sequences: list[SequenceRows]


class _WatchedTable:
    """Running sums about the rows that tokens read from an embedding."""

    def __init__(self, layer: LayerSpec, device: torch.device, coupled: bool) -> None:
        self.layer = layer
        self._coupled = coupled
        self._rows = torch.zeros(layer.out_features, dtype=torch.float64)
        width = layer.in_features
        self._weighted = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._statistics = torch.zeros_like(self._weighted)
        self._weight = 0.0
        self._n_reads = 0

    def hook(self, module: nn.Module, n_sequences: int, hooks: ExitStack) -> None:
        holders = [module.get_submodule(n) for n in (self.layer.name, *self.layer.aliases)]
        for holder in {id(h): h for h in holders if kind_of(h) == "embedding"}.values():
            self._hook_one(holder, n_sequences, hooks)

    def _hook_one(self, holder: nn.Module, n_sequences: int, hooks: ExitStack) -> None:
        looked_up: list[tuple[Tensor, float]] = []

        def keep_ids(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            ids, rows = arguments[0], output
            if ids.dim() == 2 and len(ids) == 1:
                # positions, looked up once for all sequences: each is to have a gradient of its own
                ids = ids.expand(n_sequences, -1)
                rows = output.expand(n_sequences, *output.shape[1:])
            looked_up.append((ids, _scale(output, cast(Tensor, holder.weight), arguments[0])))
            return rows

        def take(call: int, gradient: Tensor) -> None:
            ids, scale = looked_up[call]
            for tokens, rows in zip(ids.cpu(), gradient.double().cpu() * scale, strict=True):
                self._add(tokens.flatten(), rows.reshape(-1, rows.shape[-1]))

        handle = holder.register_forward_hook(keep_ids)
        hooks.callback(handle.remove)
        _watch_output(holder, hooks, take)

    def _add(self, tokens: Tensor, gradients: Tensor) -> None:
        """One sequence: what reads the same row errs alike, different rows on their own.

        Rows are added up on the CPU, where the order is always the same.
        """
        if self._coupled:
            tokens, places = torch.unique(tokens, return_inverse=True)
            summed = gradients.new_zeros(len(tokens), gradients.shape[1])
            gradients = summed.index_add_(0, places, gradients)
        energies = gradients.square().sum(1)
        self._rows.index_add_(0, tokens, energies)
        reached = energies > 0
        # as a token's input, whose norm does not count for its weight
        weights = energies[reached] ** (TEMPERING - 1)
        scaled = gradients[reached] * weights.sqrt()[:, None]
        for total, part in ((self._weighted, gradients), (self._statistics, scaled)):
            there = part.to(total.device)
            total.addmm_(there.T, there)
        self._weight += float((energies[reached] ** TEMPERING).sum())
        self._n_reads += int(reached.sum())

    def result(self, n_units: int) -> Lookup:
        rows = (self._rows / max(1, n_units)).float()
        hessian = (self._weighted / (float(self._weighted.trace()) or 1.0)).float()
        statistics = (self._statistics / (self._weight or 1.0)).float()
        _require_finite(self.layer.name, rows, hessian, statistics)
        return Lookup(rows, hessian.cpu(), statistics.cpu(), self._n_reads)


def _watch_output(module: nn.Module, hooks: ExitStack, take: Callable[[int, Tensor], None]) -> None:
    """Call ``take(number of the call, gradient of its output)`` during backward."""
    n_calls = 0

    def watch(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal n_calls
        call, n_calls = n_calls, n_calls + 1
        if not output.requires_grad:
            # the graph starts here; a copy, because a leaf must not be changed in place
            output = output.detach().requires_grad_().clone()
        output.register_hook(lambda g: take(call, g.detach()))  # type: ignore[no-untyped-call]
        return output

    hooks.callback(module.register_forward_hook(watch).remove)


def _scale(output: Tensor, weight: Tensor, ids: Tensor) -> float:
    """The c in ``output = c * weight[ids]``: some families scale their embeddings."""
    rows = weight.detach()[ids].double()
    norm = float(rows.square().sum())
    return float((output.detach().double() * rows).sum()) / norm if norm > 0 else 1.0


def _multiplying(module: nn.Module, layer: LayerSpec) -> nn.Module:
    """The module through which the layer multiplies: a tied head, not the embedding."""
    holders = (module.get_submodule(name) for name in (layer.name, *layer.aliases))
    return next(holder for holder in holders if kind_of(holder) != "embedding")


def _require_finite(name: str, *tensors: Tensor | None) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in tensors if t is not None):
        raise ModelError(
            f"Activations and gradients must be finite, but those of layer {name!r} hold NaN or "
            "infinity (or overflow float32). Load the model in float32 and check its weights."
        )
