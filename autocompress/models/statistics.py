"""Layer statistics: ``H = E[x x^T]`` of every layer's input over calibration tokens.

Memory stays flat however deep the model is. Inputs are handled in windows of consecutive blocks
whose accumulators fit the budget; each window runs the calibration batches through the model again
and stops every forward as soon as the window's last input was seen. What is resident at any time:
the model, one batch's activations, and the larger of the budget and one input's accumulator. The
price is time: ``w`` equal windows cost about ``(w + 1) / 2`` times one full pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.core import LayerSpec, digest, digest_bytes
from autocompress.core.errors import ModelError
from autocompress.methods import LayerStatistics
from autocompress.models.calibration import (
    Batch,
    LayerInput,
    TensorFiles,
    layers_in_words,
    second_moment,
    token_rows,
    wanted_inputs,
    windows,
)
from autocompress.models.experts import routed_to
from autocompress.models.layout import ModelLayout
from autocompress.models.reads import require_shared, sharing, watched_reads
from autocompress.models.streams import TokenMasks, encoder_prefix

_log = logging.getLogger(__name__)

_FORMAT = "layer statistics 1"
Progress = Callable[[int, int], None]
"""Called after each forward with the number of forwards done and their total."""


class StatisticsStore:
    """A folder with one safetensors file per distinct layer input.

    Files appear by atomic rename and are read memory-mapped, so any number of workers may read
    while one process collects. A damaged file counts as absent: it is named in a warning and
    collected again.

    Args:
        root: folder for one pair of model and calibration tokens. The caller names it by their
            digests, so that another model or other tokens never meet these files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files = TensorFiles(root, _FORMAT, "Layer statistics")

    def __contains__(self, input_name: object) -> bool:
        return isinstance(input_name, str) and self._files.header(input_name) is not None

    def get(self, layer: LayerSpec) -> LayerStatistics:
        """Statistics of the layer's input; none for an embedding that is not also the head.

        Raises:
            ModelError: they were not collected.
        """
        if layer.input_name is None:
            return LayerStatistics.none()
        header = self._files.header(layer.input_name)
        if header is None:
            raise ModelError(
                f"Layer {layer.name!r} needs the statistics of its input {layer.input_name!r}, "
                f"which are not in {self.root}. Run collect_statistics with this layer first."
            )
        hessian = None
        if header["n_tokens"] != "0":
            hessian = self._files.tensors(layer.input_name)["hessian"]
        return LayerStatistics.sampled(hessian, int(header["n_tokens"]), header["digest"])

    def put(self, input_name: str, hessian: Tensor | None, n_tokens: int) -> None:
        """Write the statistics of one input; `hessian` is (d, d) float32, None if never seen.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        tensors = {} if hessian is None else {"hessian": hessian.contiguous()}
        content = [digest_bytes(t.numpy().data.cast("B")) for t in tensors.values()]
        header = {
            "input_name": input_name,
            "n_tokens": str(n_tokens),
            "digest": digest([_FORMAT, n_tokens, *content]),
        }
        self._files.write(input_name, tensors, header)

    @property
    def digest(self) -> str:
        """Digest of everything stored: equal content, equal digest."""
        return digest(sorted([h["input_name"], h["digest"]] for h in self._files.headers()))


def collect_statistics(
    module: nn.Module,
    layout: ModelLayout,
    batches: Sequence[Batch],
    store: StatisticsStore,
    *,
    layers: Collection[str] | None = None,
    memory_budget_bytes: int = 2 << 30,
    progress: Progress | None = None,
) -> None:
    """Collect ``H = X^T X / n`` for the inputs that the store lacks.

    Padding is left out: rows of an input are tokens only where the mask of its stream says so (the
    attention mask; in a decoder its own mask or the labels that count). Inputs without a token axis
    (a pooled vector) count every row. Products are float32, their sums float64 in order of the
    batches, so the result does not depend on the windows. Each layer is taken to run once per
    forward.

    Args:
        module: the model, in evaluation mode.
        layout: of the model.
        batches: model inputs as the task feeds them, padded, on any device.
        store: where results go, input by input; what it holds already is not collected again.
        layers: names of the layers whose inputs are wanted; None for all.
        memory_budget_bytes: for accumulators; at least one input is always handled at a time.
        progress: told about every forward.

    Raises:
        ModelError: an activation is not finite; a layer name is unknown; layers of one input read
            different tensors.
        RunDirectoryError: the store cannot be written.
    """
    wanted = wanted_inputs(layout, layers)
    missing = [item for item in wanted if item.name not in store]
    parts = list(windows(missing, memory_budget_bytes))
    masks = TokenMasks(encoder_prefix(module))
    done, total = 0, len(parts) * len(batches)
    unreached: list[str] = []
    for window in parts:
        sums = {item.name: _Accumulator(item) for item in window}
        for batch in batches:
            _observe(module, layout, batch, sums, masks)
            done += 1
            if progress is not None:
                progress(done, total)
        for name, accumulator in sums.items():
            hessian, n_tokens = accumulator.result()
            store.put(name, hessian, n_tokens)
            if hessian is None:
                unreached.append(name)
    if unreached:
        _log.warning(
            "No token reached %s in calibration: no statistics there.", layers_in_words(unreached)
        )


class _Accumulator:
    """Running sum of ``X^T X``."""

    def __init__(self, item: LayerInput) -> None:
        self.item = item
        self._sum: Tensor | None = None
        self._n_tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add (n, d) rows of any float dtype."""
        product = second_moment(rows)
        if self._sum is None:
            self._sum = torch.zeros_like(product, dtype=torch.float64)
        self._sum += product
        self._n_tokens += rows.shape[0]

    def result(self) -> tuple[Tensor | None, int]:
        """``H`` (d, d) float32 on the CPU and the number of tokens; None and 0 if never seen."""
        if self._sum is None or self._n_tokens == 0:
            return None, 0
        hessian = (self._sum / self._n_tokens).to(torch.float32).cpu()
        if not torch.isfinite(hessian).all():
            raise ModelError(
                f"Activations must be finite, but the input of layer {self.item.name!r} has NaN or "
                "infinite values (or overflows float32). Load the model in float32 or bfloat16 and "
                "check its weights."
            )
        return hessian, self._n_tokens


class _AllSeen(Exception):  # noqa: N818  # it is no error
    """Leaves a forward once every input of the window was observed."""


def _observe(
    module: nn.Module,
    layout: ModelLayout,
    batch: Batch,
    sums: Mapping[str, _Accumulator],
    masks: TokenMasks,
) -> None:
    """Run one batch far enough for every accumulator to see its input."""
    device = next(module.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    readers = [layer for layer in sharing(layout) if layer.input_name in sums]
    with (
        torch.no_grad(),
        watched_reads(module, layout, readers) as reads,
        _hooks(module, inputs, sums, masks),
        suppress(_AllSeen),
    ):
        module(**inputs)
    require_shared(layout, reads)


@contextmanager
def _hooks(
    module: nn.Module, inputs: Batch, sums: Mapping[str, _Accumulator], masks: TokenMasks
) -> Iterator[None]:
    pending = set(sums)

    def watch(accumulator: _Accumulator) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        item = accumulator.item

        def observe(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            mask = masks.of(item.name, inputs, reads_encoder_output=item.reads_encoder_output)
            accumulator.add(token_rows(arguments[0], mask, routed_to(module, item.name)))
            pending.discard(item.name)
            if not pending:
                raise _AllSeen

        return observe

    with ExitStack() as stack:
        for name, accumulator in sums.items():
            handle = module.get_submodule(name).register_forward_pre_hook(watch(accumulator))
            stack.callback(handle.remove)
        yield
