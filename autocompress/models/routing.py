"""How many tokens a router sends to each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.models.calibration import Batch
from autocompress.models.experts import SeparateExperts
from autocompress.models.layout import ModelLayout
from autocompress.models.streams import TokenMasks, encoder_prefix


def count_routed(
    module: nn.Module, layout: ModelLayout, batches: Sequence[Batch]
) -> dict[str, int]:
    """Tokens that reach each layer of an expert, padding left out; one forward per batch.

    Args:
        module: the model, in evaluation mode, its experts separate.
        layout: of the model.
        batches: model inputs as the task feeds them.

    Returns:
        By layer name; layers outside experts are absent.
    """
    mixtures = {n: m for n, m in module.named_modules() if isinstance(m, SeparateExperts)}
    counts = {name: torch.zeros(m.n_experts, dtype=torch.int64) for name, m in mixtures.items()}
    masks = TokenMasks(encoder_prefix(module))
    device = next(module.parameters()).device
    for batch in batches if mixtures else ():
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with ExitStack() as hooks, torch.no_grad():
            for name, mixture in mixtures.items():
                mask = masks.of(name, inputs, reads_encoder_output=False)
                hook = mixture.register_forward_pre_hook(_Counter(counts[name], mask))
                hooks.callback(hook.remove)
            module(**inputs)
    return _by_layer(layout, counts)


class _Counter:
    """A forward hook that adds the experts of all tokens that count."""

    def __init__(self, counts: Tensor, mask: Tensor | None) -> None:
        self._counts, self._mask = counts, mask

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        experts: Tensor = arguments[1]
        mask = self._mask
        if mask is not None and mask.numel() == len(experts):
            experts = experts[mask.reshape(-1)]
        found = torch.bincount(experts.reshape(-1).cpu(), minlength=len(self._counts))
        self._counts += found[: len(self._counts)]  # an index beyond the last expert is none


def _by_layer(layout: ModelLayout, counts: Mapping[str, Tensor]) -> dict[str, int]:
    return {
        layer.name: int(counts[layer.name.rsplit(".", 2)[0]][layer.expert.index])
        for layer in layout.layers
        if layer.expert is not None
    }
