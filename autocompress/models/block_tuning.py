"""Scales and rounding that suit a whole block: those of its layers follow the block's output.

Block-wise reconstruction (BRECQ, Li et al. 2021, arXiv 2102.05426, section 3.2): scales and
roundings of all layers of a block move against the gradient of ``sum_t w_t |y_t - z_t|^2``, y_t the
block's output on what the compressed blocks before it put out, z_t that of the base model, w_t the
weight of the token. Step sizes fall linearly to zero.

Some batches are held back. The state that errs least on them is kept, the first one among them, so
a block that was compressed well already stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.methods import CompressedWeight, Tunable
from autocompress.models.block_runs import BlockRun

FIRST_STEP = 0.006  # share of a scale
ROUNDING_STEP = 0.032  # first one, of a step of the grid, over 4^bits: finer grids, smaller gains
_HELD_BACK = 4  # every fourth batch
_LOOKS = 5  # at the batches held back, in equal distances


@dataclass(frozen=True, eq=False)
class Tuned:
    """What came of a block.

    Attributes:
        layers: packed, by name; those given if nothing was better.
        before: loss on the batches held back.
        after: the same of what is kept.
    """

    layers: Mapping[str, CompressedWeight]
    before: float
    after: float


def tune_block(
    run: BlockRun,
    packed: Mapping[str, CompressedWeight],
    weights: Mapping[str, Tensor],
    *,
    steps: int,
    dtype: torch.dtype,
) -> Tuned:
    """Tune the layers of a block together.

    Args:
        run: the block, all of whose other layers are as they will be.
        packed: the layers to tune, by name, on the model's device; see `is_tunable`.
        weights: what they were compressed from, (o, d), by name.
        steps: of gradient descent, each on one batch.
        dtype: that the model computes in.
    """
    held = [n for n in range(run.n_batches) if n % _HELD_BACK == _HELD_BACK - 1]
    held = held or list(range(1, run.n_batches))[:1]
    seen = [n for n in range(run.n_batches) if n not in held]
    if not packed or not held or not seen:
        return Tuned(dict(packed), 0.0, 0.0)
    movable = {name: Tunable(layer, weights[name]) for name, layer in packed.items()}

    def dense() -> dict[str, Tensor]:
        return {name: one.dense(dtype) for name, one in movable.items()}

    def error() -> float:
        now = dense()
        return sum(run.loss(n, now) for n in held)

    best, before = dict(packed), error()
    least = before
    for step in range(steps):
        left = 1 - step / steps
        for name, gradient in run.gradients(seen[step % len(seen)], dense()).items():
            one = movable[name]
            one.descend(gradient, FIRST_STEP * left, ROUNDING_STEP / 4**one.bits * left)
        if (step + 1) * _LOOKS // steps > step * _LOOKS // steps:
            now = error()
            if now < least:
                least = now
                best = {name: one.packed() for name, one in movable.items()}
    return Tuned(best, before, least)
