"""The scores that published allocators predict damage with, from one backward pass each batch.

They differ from the profile of this package on purpose: a comparison "on the same bank" must give
each peer its own criterion.

* ``gradient``: sum |G * dW|, as AutoRound's AutoScheme (its documentation, "delta loss").
* ``fisher``: sum over tokens and outputs of (g * dy)^2, as Model Optimizer's AutoQuantize.
* ``trace``: mean Hessian trace times |dW|^2, HAWQ-V2 (Dong et al. 2020, arXiv 1911.03852).

G is the gradient of the summed loss by the weight, g by the layer's output, dW the weight's error
and dy the error of the output. The trace is that of the Gauss-Newton matrix: with labels (or
directions) drawn from the model, |G|^2 has it as its expectation, where HAWQ draws Rademacher
vectors and differentiates twice. A weight that two layers share counts at one of them only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.core import Scheme
from autocompress.core.errors import UsageError
from autocompress.models import weight_matrix
from autocompress.models.layout import ModelLayout
from autocompress.search.option_table import PerChoice
from autocompress.spaces import SearchSpace

SCORES = ("gradient", "fisher", "trace")

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch, torch.Generator], Tensor]
Dense = Callable[[str, Scheme], Tensor]
"""The decoded weight (o, d) of a layer under a scheme."""


def peer_scores(
    module: nn.Module,
    layout: ModelLayout,
    space: SearchSpace,
    *,
    batches: Sequence[Batch],
    loss: Loss,
    dense: Dense,
    seed: int = 0,
) -> Mapping[str, PerChoice]:
    """Each score of each option, summed over the layers of its choice.

    Args:
        module: the base model; its parameters get no gradients.
        layout: names its layers.
        space: whose options are scored.
        batches: of `Task.curvature_batches`.
        loss: `Task.curvature_loss` or another summed scalar.
        dense: decoded weights; of a `Bank`, for instance.
        seed: of the loss's draws.

    Returns:
        By name of the score, one array per choice.
    """
    totals = {name: [np.zeros(len(c.options)) for c in space.choices] for name in SCORES}
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        seen = _observe(module, space.searched_layers, batch, loss, generator)
        for position, choice in enumerate(space.choices):
            for level, option in enumerate(choice.options):
                for name, scheme in zip(choice.layers, option.schemes, strict=True):
                    base = weight_matrix(module, layout.layer(name)).float()
                    error = dense(name, scheme).to(base) - base
                    for score, value in _scores(*seen[name], error).items():
                        totals[score][position][level] += value / len(batches)
    return {name: tuple(arrays) for name, arrays in totals.items()}


def _scores(inputs: Tensor, gradients: Tensor, error: Tensor) -> dict[str, float]:
    """Scores of one layer and option; inputs (n, d) or ids (n,), gradients (n, o)."""
    if inputs.is_floating_point():
        weight_gradient = gradients.T @ inputs
        output_error = inputs @ error.T
    else:
        weight_gradient = torch.zeros_like(error).index_add_(0, inputs, gradients)
        output_error = error[inputs]
    per_weight = float(weight_gradient.square().sum()) / error.numel()
    return {
        "gradient": float((weight_gradient * error).abs().sum()),
        "fisher": float((gradients * output_error).square().sum()),
        "trace": per_weight * float(error.square().sum()),
    }


def _observe(
    module: nn.Module, layers: Sequence[str], batch: Batch, loss: Loss, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input (n, d), or ids (n,), and gradient of the output (n, o) of each layer."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[name] = arguments[0].detach()
            # A leaf of its own where no parameter asks for gradients.
            outputs[name] = output if output.requires_grad else output.requires_grad_()
            return outputs[name]

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for name in layers:
            stack.enter_context(module.get_submodule(name).register_forward_hook(watch(name)))
        value = loss(module, batch, generator)
        missing = [name for name in layers if name not in outputs]
        if missing:
            raise UsageError(
                f"Scores need every searched layer to take part in a forward pass, but "
                f"{missing[0]!r} did not. Next step: leave it out of the space."
            )
        found = torch.autograd.grad(value, [outputs[name] for name in layers])
    return {
        name: (_rows(inputs[name]), _rows(gradient))
        for name, gradient in zip(layers, found, strict=True)
    }


def _rows(values: Tensor) -> Tensor:
    """(n, width) in float32; ids stay (n,)."""
    if not values.is_floating_point():
        return values.flatten()
    return values.flatten(0, -2).float()
