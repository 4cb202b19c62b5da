"""How the loss of a sequence changes along errors of weights: what they damage, to second order.

With L the loss of one sequence (labels drawn from the model itself), an error D of any weights
damages the model by ``1/2 E[<dL/dW, D>^2]`` per unit of the damage, to second order: the Fisher
information along D (Amari 1998, Natural gradient works efficiently in learning, section 2). Every
term between outputs, tokens and layers is in it, which ``f_r H`` of `curvature` leaves out. In
exchange it is a mean over sequences, each with a draw of its labels: n of them leave a relative
error of about sqrt(2 / n).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.core import derived_seed
from autocompress.models.calibration import Batch
from autocompress.models.curvature_pass import Loss, Progress
from autocompress.models.layout import ModelLayout
from autocompress.models.weights import frozen, to_module_orientation


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
    errors: Callable[[str], Tensor],
    draws: int = 1,
    seed: int = 0,
    memory_budget_bytes: int = 2 << 30,
    progress: Progress | None = None,
) -> Slopes:
    """Slopes along errors of single layers.

    The labels of a sequence depend on the seed, the draw and its place alone, so the result does
    not depend on the budget.

    Args:
        module: the model, in evaluation mode, float32 or bfloat16 for gradients that do not vanish.
        layout: of the model.
        sequences: batches of one sequence each, with what `loss` reads besides.
        loss: e.g. `evaluate.TaskLoss`.
        n_errors: by layer name, the number of its errors.
        errors: of a layer, ``dense - weight``, (errors, o, d) float32; asked once per layer.
        draws: of labels, for every sequence.
        seed: of the labels.
        memory_budget_bytes: for errors and gradients; at least one layer is always handled at a
            time, and every window of layers runs all sequences again.
        progress: told about every sequence done, and their total over all windows.

    Raises:
        ModelError: a layer name is unknown.
    """
    first = next(module.parameters())
    dtype = slope_dtype(first.dtype, first.device)
    parts = slope_windows(layout, n_errors, dtype, memory_budget_bytes)
    samples = [(draw, place) for draw in range(draws) for place in range(len(sequences))]
    found: dict[str, Tensor] = {}
    done, n_units = 0, 0
    for part in parts:
        along = {name: errors(name).flatten(1).to(dtype) for name in part}
        rows: dict[str, list[Tensor]] = {name: [] for name in part}
        n_units = 0  # that of every window is the same
        with _differentiable(module, part) as weights:
            for draw, place in samples:
                generator = torch.Generator().manual_seed(derived_seed("slopes", seed, draw, place))
                value, n = loss(module, _on(sequences[place], weights), generator)
                n_units += n
                for name, gradient in _gradients(value, weights).items():
                    turned = to_module_orientation(gradient, layout.layer(name)).to(dtype)
                    rows[name].append((along[name] @ turned.flatten()).double().cpu())
                done += 1
                if progress is not None:
                    progress(done, len(parts) * len(samples))
        found |= {name: torch.stack(taken) for name, taken in rows.items() if taken}
    return Slopes(found, n_units)


def slope_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of errors and gradients: the model's own on a GPU, float32 on CPUs, where it is faster."""
    return dtype if device.type == "cuda" else torch.float32


def slope_windows(
    layout: ModelLayout, n_errors: Mapping[str, int], dtype: torch.dtype, budget: int
) -> list[list[str]]:
    """Names of layers whose errors and gradients fit the budget together, or single ones.

    Args:
        layout: of the model.
        n_errors: by layer name, the number of its errors.
        dtype: of errors and gradients.
        budget: bytes.
    """
    windows: list[list[str]] = []
    used = 0
    for name, n in n_errors.items():
        size = dtype.itemsize * (n + 1) * layout.layer(name).n_weights
        if not windows or used + size > budget:
            windows.append([])
            used = 0
        windows[-1].append(name)
        used += size
    return windows


@contextmanager
def _differentiable(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
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


def _on(batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(iter(weights.values())).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _gradients(value: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By layer name; zero where the loss does not depend on a layer."""
    if not value.requires_grad:
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}
    found = torch.autograd.grad(
        value, list(weights.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(weights, found, strict=True))
