"""How the loss of a sequence changes along errors of weights: what they damage, to second order.

With L the loss of one sequence (labels drawn from the model itself), an error D of any weights
damages the model by ``1/2 E[<dL/dW, D>^2]`` per unit of the damage, to second order: the Fisher
information along D (Amari 1998, Natural gradient works efficiently in learning, section 2). Every
term between outputs, tokens and layers is in it, which ``f_r H`` of `curvature` leaves out. In
exchange it is a mean over sequences, each with a draw of its labels: n of them leave a relative
error of about sqrt(2 / n).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.core import derived_seed
from autocompress.models.calibration import Batch
from autocompress.models.curvature_pass import Loss, Progress
from autocompress.models.layout import ModelLayout
from autocompress.models.weights import frozen, to_module_orientation

ErrorsOf = Callable[[str], Iterable[Tensor]]
"""Of a layer: ``dense - weight`` under each of its schemes, (o, d) float32, one after another."""

_ROUNDED = torch.bfloat16  # errors: that is nothing beside the noise of few samples
_AT_ONCE = 1 << 17  # weights that are made wider again: they stay in a cache


@dataclass(frozen=True, eq=False)
class Slopes:
    """Directional derivatives of sampled losses.

    Attributes:
        by_layer: along each error of each layer, (samples, errors), float64; the samples of all
            layers are the same, so slopes of errors that are made together add up.
        n_units: what the damage is averaged over (tokens, examples), summed over the samples.
    """

    by_layer: Mapping[str, Tensor]
    n_units: int

    @property
    def n_samples(self) -> int:
        """Sequences times draws."""
        return len(next(iter(self.by_layer.values())))


def collect_slopes(
    module: nn.Module,
    layout: ModelLayout,
    sequences: Sequence[Batch],
    loss: Loss,
    *,
    n_errors: Mapping[str, int],
    errors: ErrorsOf,
    draws: int = 1,
    seed: int = 0,
    memory_budget_bytes: int = 2 << 30,
    progress: Progress | None = None,
) -> Slopes:
    """Slopes along errors of single layers.

    One backward per sample meets the errors of a layer when its gradient is ready and drops the
    gradient then, so one layer's gradient is in memory at a time. Errors that the budget does not
    hold are made anew for each sample. The labels of a sequence depend on the seed, the draw and
    its place alone, so the result does not depend on the budget.

    Args:
        module: the model, in evaluation mode, float32 or bfloat16 for gradients that do not vanish.
        layout: of the model.
        sequences: batches of one sequence each, with what `loss` reads besides.
        loss: e.g. `evaluate.TaskLoss`.
        n_errors: by layer name, the number of its errors.
        errors: of a layer, one after another: ``dense - weight``, (o, d) float32; rounded to
            bfloat16 here.
        draws: of labels, for every sequence.
        seed: of the labels.
        memory_budget_bytes: for errors that are kept; as many layers' as fit, in the given order.
        progress: told about every sample done, and their total.

    Raises:
        ModelError: a layer name is unknown.
    """
    first = next(module.parameters())
    dtype = _slope_dtype(first.dtype, first.device)
    along = _Errors(layout, n_errors, errors, memory_budget_bytes)
    samples = [(draw, place) for draw in range(draws) for place in range(len(sequences))]
    found = {
        name: torch.zeros(len(samples), n, dtype=torch.float64) for name, n in n_errors.items()
    }
    n_units = 0
    with _differentiable(module, n_errors) as weights:
        for number, (draw, place) in enumerate(samples):

            def take(name: str, gradient: Tensor, number: int = number) -> None:
                turned = to_module_orientation(gradient, layout.layer(name)).to(dtype)
                found[name][number] = along.product(name, turned.flatten())

            generator = torch.Generator().manual_seed(derived_seed("slopes", seed, draw, place))
            value, n = loss(module, _on(sequences[place], first.device), generator)
            n_units += n
            _backward(value, weights, take)
            if progress is not None:
                progress(number + 1, len(samples))
    return Slopes(found, n_units)


def _slope_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of gradients: the model's own on a GPU, float32 on CPUs, where it is faster."""
    return dtype if device.type == "cuda" else torch.float32


class _Errors:
    """Errors of layers, flat: kept as far as the budget goes, else made whenever they are met."""

    def __init__(
        self, layout: ModelLayout, n_errors: Mapping[str, int], errors: ErrorsOf, budget: int
    ) -> None:
        self._made = errors
        self._kept: dict[str, Tensor] = {}
        for name, n in n_errors.items():
            size = _ROUNDED.itemsize * n * layout.layer(name).n_weights
            if size <= budget:
                self._kept[name] = self._stacked(name, n)
                budget -= size

    def product(self, name: str, gradient: Tensor) -> Tensor:
        """Of each error of a layer with its gradient, (errors,)."""
        if name in self._kept:
            return _product(self._kept[name], gradient)
        return torch.cat([_product(error[None], gradient) for error in self._of(name)])

    def _stacked(self, name: str, n: int) -> Tensor:
        found: Tensor | None = None
        for row, error in zip(range(n), self._of(name), strict=True):
            if found is None:
                found = error.new_empty(n, len(error))
            found[row] = error
        assert found is not None  # a layer without errors is not asked for
        return found

    def _of(self, name: str) -> Iterator[Tensor]:
        return (error.flatten().to(_ROUNDED) for error in self._made(name))


def _product(errors: Tensor, gradient: Tensor) -> Tensor:
    """Of errors (n, weights) with a gradient, (n,); sums are in float32 or wider."""
    if errors.dtype == gradient.dtype:
        return errors @ gradient  # one product, which adds up in float32 within
    found = torch.zeros(
        len(errors),
        dtype=torch.promote_types(gradient.dtype, torch.float32),
        device=gradient.device,
    )
    parts = zip(torch.split(errors, _AT_ONCE, dim=1), torch.split(gradient, _AT_ONCE), strict=True)
    for some, part in parts:
        found += some.to(part.dtype) @ part
    return found


@contextmanager
def _differentiable(
    module: nn.Module, layers: Collection[str]
) -> Iterator[dict[str, nn.Parameter]]:
    """Within the block the weights of these layers, and no others, take part in the graph."""
    weights = {name: module.get_parameter(f"{name}.weight") for name in layers}
    with frozen(module), torch.enable_grad():
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            yield dict(weights)
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)


def _on(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _backward(
    value: Tensor, weights: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> None:
    """Hand over the gradient of each weight that the loss depends on, and drop it."""
    if not value.requires_grad:
        return

    def taking(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            take(name, weight.grad)
            weight.grad = None

        return hook

    with ExitStack() as hooks:
        for name, weight in weights.items():
            handle = weight.register_post_accumulate_grad_hook(taking(name))  # type: ignore[no-untyped-call]
            hooks.callback(handle.remove)
        value.backward()  # type: ignore[no-untyped-call]
