"""Running one block of a model on top of those before it, which do not run again.

In the place of blocks that are done stands what the last of them put out for the batch, so the
model's own code runs unchanged, whatever it does around its blocks (masks, positions, an encoder
and a decoder), and needs no replay of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from autocompress.core import LayerSpec
from autocompress.core.errors import ModelError
from autocompress.models.calibration import Batch, token_rows
from autocompress.models.layout import ModelLayout
from autocompress.models.streams import TokenMasks, encoder_prefix
from autocompress.models.weights import overridden, to_module_orientation, weight_matrix

TokenWeights = Callable[[str], Tensor | None]
"""From an input's name to the weight of each of its tokens, (n,), in the order of the batches."""


class _Reached(Exception):  # noqa: N818  # it is no error
    """Leaves a forward with what the last block of interest put out."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Prefix:
    """The blocks that are done, as what the last of each stack put out for every batch."""

    def __init__(self, module: nn.Module, layout: ModelLayout, batches: Sequence[Batch]) -> None:
        device = next(module.parameters()).device
        self.module = module
        self.layout = layout
        self.batches = [{n: t.to(device) for n, t in batch.items()} for batch in batches]
        self._outputs: dict[str, list[Any]] = {}

    def forward(self, batch: int, stop_after: int | None) -> Any:
        """Run one batch on top of the prefix; the output of block `stop_after` if there is one."""
        with ExitStack() as hooks:
            if stop_after is not None:
                last = self.module.get_submodule(self.layout.blocks[stop_after])
                hooks.callback(last.register_forward_hook(_leave).remove)
            for name in self.layout.blocks[:stop_after]:
                stack = stack_of(name)
                if stack in self._outputs:
                    block = self.module.get_submodule(name)
                    hooks.enter_context(_replaced(block, self._outputs[stack][batch]))
            try:
                self.module(**self.batches[batch])
            except _Reached as reached:
                return reached.output
        return None

    def extend(self, index: int, outputs: list[Any]) -> None:
        """Block `index` is done; its stack's earlier outputs are not needed any more."""
        self._outputs[stack_of(self.layout.blocks[index])] = outputs


class BasePrefix:
    """What the blocks of the base model put out, block by block.

    Args:
        module: the model; its tables may be exchanged later on.
        layout: of the model.
        batches: model inputs.
        tables: embeddings that are exchanged while the base model runs: it computes with those of
            now.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ModelLayout,
        batches: Sequence[Batch],
        tables: Sequence[LayerSpec],
    ) -> None:
        self._prefix = Prefix(module, layout, batches)
        self._layout = layout
        self._tables = {table.name: weight_matrix(module, table) for table in tables}

    def outputs(self, index: int) -> list[Tensor]:
        """Hidden states (batch, tokens, d) that block `index` puts out; asked in order, once."""
        prefix = self._prefix
        with overridden(prefix.module, self._layout, self._tables), torch.no_grad():
            found = [prefix.forward(n, index) for n in range(len(prefix.batches))]
        prefix.extend(index, found)
        return [_hidden(output) for output in found]


class BlockRun:
    """A block that reads what the compressed blocks before it put out.

    Attributes:
        n_batches: batches of calibration tokens.

    Args:
        prefix: the compressed blocks before it.
        index: of the block.
        targets: what the base model's block puts out for each batch, (batch, tokens, d).
        token_weights: of the tokens of an input; those of the block are of what its last layer
            reads.
    """

    def __init__(
        self,
        prefix: Prefix,
        index: int,
        targets: Sequence[Tensor],
        token_weights: TokenWeights | None,
    ) -> None:
        self.n_batches = len(prefix.batches)
        self._prefix, self._index = prefix, index
        masks = TokenMasks(encoder_prefix(prefix.module))
        name = prefix.layout.blocks[index]
        self._masks = [masks.of(name, b, reads_encoder_output=False) for b in prefix.batches]
        self._targets = [token_rows(t, m) for t, m in zip(targets, self._masks, strict=True)]
        self._weights = self._shares(token_weights)
        energies = [
            float(t.float().square().sum(1) @ w.to(t.device))
            for t, w in zip(self._targets, self._weights, strict=True)
        ]
        self._energy = sum(energies) or 1.0

    def loss(self, number: int, weights: Mapping[str, Tensor]) -> float:
        """Weighted squared error of the block's output on a batch; of all batches it adds up.

        Relative to the weighted squares of what the base model's block puts out on all batches.

        Args:
            number: of the batch.
            weights: matrices of layers of the block, by name.
        """
        layout = self._prefix.layout
        with overridden(self._prefix.module, layout, weights), torch.no_grad():
            return float(self._loss(number))

    def gradients(self, number: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient of the loss on a batch with respect to each of `weights`, (o, d)."""
        module, layout = self._prefix.module, self._prefix.layout
        with overridden(module, layout, weights), torch.enable_grad():
            leaves = [
                cast(nn.Parameter, module.get_submodule(name).weight).requires_grad_()
                for name in weights
            ]
            found = torch.autograd.grad(
                self._loss(number), leaves, allow_unused=True, materialize_grads=True
            )
        return {
            name: to_module_orientation(gradient, layout.layer(name))
            for name, gradient in zip(weights, found, strict=True)
        }

    def _loss(self, number: int) -> Tensor:
        output = _hidden(self._prefix.forward(number, self._index))
        rows, target = token_rows(output, self._masks[number]).float(), self._targets[number]
        shares = self._weights[number].to(rows.device)
        error = (rows - target.float()).square().sum(1) @ shares
        return error / self._energy

    def _shares(self, token_weights: TokenWeights | None) -> list[Tensor]:
        """Weight of each token of each batch, (n,) float32."""
        sizes = [len(target) for target in self._targets]
        last = [x for x in self._prefix.layout.layers if x.block == self._index and x.input_name]
        found = None
        if token_weights is not None and last and last[-1].input_name is not None:
            found = token_weights(last[-1].input_name)
        if found is None or len(found) != sum(sizes) or float(found.max()) <= 0:
            found = torch.ones(sum(sizes))
        return list(torch.split(found.float() / found.float().mean(), sizes))


def stack_of(block: str) -> str:
    """Name of the list that holds a block: encoder and decoder are two stacks."""
    return block.rpartition(".")[0]


def _leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    raise _Reached(output)


@contextmanager
def _replaced(block: nn.Module, output: Any) -> Iterator[None]:
    """Within the context the block does not run but puts out a copy of `output`."""

    def stand_in(*_: Any, **__: Any) -> Any:
        return _copied(output)  # the model may write to what its blocks put out

    block.forward = stand_in
    try:
        yield
    finally:
        del block.forward  # the class's own is back


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(map(_copied, value))
    if isinstance(value, Mapping):
        raise ModelError(
            "A block must put out tensors or tuples of them to be compressed sequentially, but "
            f"got {type(value).__name__}."
        )
    return value


def _hidden(output: Any) -> Tensor:
    """The hidden states of a block's output."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(
            "A block must put out its hidden states first to be tuned, but got "
            f"{type(hidden).__name__}. Finalize without tuning blocks."
        )
    return hidden
