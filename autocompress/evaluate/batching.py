"""From a split to padded batches, and from a batch to a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from autocompress.evaluate.splits import Example

IGNORED = -100
"""Label of a position that is not scored, as in transformers."""


def batch_indices(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions grouped into batches of like length, longest first, ties in given order."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    size = max(1, batch_size)
    return [order[start : start + size] for start in range(0, len(order), size)]


def pad_ids(sequences: Sequence[Tensor], padding: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, both (batch, longest), padded on the right."""
    return {
        "input_ids": pad_sequence(list(sequences), batch_first=True, padding_value=padding),
        "attention_mask": mask_of(sequences),
    }


def pad_labels(sequences: Sequence[Tensor]) -> Tensor:
    """Labels (batch, longest), padded on the right with `IGNORED`."""
    return pad_sequence(list(sequences), batch_first=True, padding_value=IGNORED)


def mask_of(sequences: Sequence[Tensor]) -> Tensor:
    """1 at tokens, 0 at padding: (batch, longest), int64."""
    lengths = torch.tensor([s.numel() for s in sequences])
    return (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()


def pad_token_of(examples: Sequence[Example]) -> int:
    """The padding token that the examples were encoded with."""
    return int(examples[0]["pad_token_id"]) if "pad_token_id" in examples[0] else 0


def place(batch: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The batch on the module's device, floating-point inputs in the module's dtype."""
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    return {
        name: tensor.to(parameter.device, parameter.dtype)
        if tensor.is_floating_point()
        else tensor.to(parameter.device)
        for name, tensor in batch.items()
    }


def vocabulary_size(module: nn.Module) -> int:
    """Width of the module's logits as its config states it; 1 if it does not."""
    config = getattr(module, "config", None)
    return int(getattr(config, "vocab_size", 1) or 1)
