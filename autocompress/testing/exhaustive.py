"""An exact front: every allocation of a small space on a tiny model, measured.

Heuristics are graded against it. Measuring takes a minute, so the damages are kept as a golden
file and only a sample of them is measured again by the slow tests.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core import Scheme
from autocompress.fronts import non_dominated
from autocompress.methods import LayerStatistics, compress, decode
from autocompress.models import describe, overridden, weight_matrix
from autocompress.spaces.space import Choice, Option, SearchSpace
from autocompress.testing.tiny_models import Sizes, tiny_batches, tiny_model

BITS = (2, 3, 4, 8)
_SIZES = Sizes(hidden=32, intermediate=48, blocks=2, heads=2, key_value_heads=1)
_GAIN = 5.0
"""Initial weights are so small that blocks hardly change their input; a trained model's do."""
_ROLES = (("query", "key", "value", "output"), ("gate", "up"), ("down",))

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ExactSpace:
    """A tiny model, its space of six choices, and the tokens that it is measured on."""

    module: nn.Module
    space: SearchSpace
    batch: dict[str, Tensor]

    @property
    def all_levels(self) -> list[tuple[int, ...]]:
        """Every allocation's levels, the last choice fastest."""
        return list(itertools.product(*(range(len(c.options)) for c in self.space.choices)))

    def storage_bytes(self, levels: Sequence[int]) -> int:
        """Bytes of the searched layers."""
        chosen = zip(self.space.choices, levels, strict=True)
        return sum(choice.options[level].storage_bytes for choice, level in chosen)

    def damages(self, allocations: Sequence[Sequence[int]]) -> Floats:
        """KL to the uncompressed model in nats per token, (n,)."""
        layout = describe(self.module)
        dense = self._decoded()
        target = self._log_probabilities()
        damages = []
        for levels in allocations:
            weights = {
                layer: dense[layer, level]
                for choice, level in zip(self.space.choices, levels, strict=True)
                for layer in choice.layers
            }
            with overridden(self.module, layout, weights):
                found = self._log_probabilities()
            damages.append(float((target.exp() * (target - found)).sum(-1).mean()))
        return np.array(damages)

    def _log_probabilities(self) -> Tensor:
        with torch.no_grad():
            logits = self.module(input_ids=self.batch["input_ids"]).logits
        return torch.log_softmax(logits.double(), dim=-1)

    def _decoded(self) -> dict[tuple[str, int], Tensor]:
        layout = describe(self.module)
        decoded = {}
        for choice in self.space.choices:
            for level, option in enumerate(choice.options):
                for name, scheme in zip(choice.layers, option.schemes, strict=True):
                    weight = weight_matrix(self.module, layout.layer(name))
                    packed = compress(weight, scheme, LayerStatistics.none())
                    shape = (int(weight.shape[0]), int(weight.shape[1]))
                    decoded[name, level] = decode(packed.tensors, scheme, shape, weight.dtype)
        return decoded


def exact_space() -> ExactSpace:
    """The model and space of the golden file; equal on every machine but for rounding."""
    module = tiny_model("llama", sizes=_SIZES)
    with torch.no_grad():
        for layer in describe(module).layers:
            weight_matrix(module, layer).mul_(_GAIN)
    batch = tiny_batches("llama", n_batches=1, batch_size=4, length=16, padded=False, seed=1)[0]
    return ExactSpace(module.requires_grad_(False), _space(module), batch)


def _space(module: nn.Module) -> SearchSpace:
    """Attention, gate and up, and down of each block: rtn with 2, 3, 4 or 8 bits."""
    choices = []
    layout = describe(module)
    schemes = [Scheme.parse(f"rtn(bits={bits},group_size=16)") for bits in BITS]
    for block, roles in itertools.product(layout.blocks, _ROLES):
        layers = [x for x in layout.layers if x.name.startswith(f"{block}.") and x.role in roles]
        n_weights = sum(layer.n_weights for layer in layers)
        options = tuple(
            Option(str(scheme), (scheme,) * len(layers), n_weights * bits // 8)
            for scheme, bits in zip(schemes, BITS, strict=True)
        )
        names = tuple(layer.name for layer in layers)
        choices.append(Choice(f"{block}.{'+'.join(roles)}", names, options, 4 * n_weights))
    return SearchSpace("exhaustive", "every allocation of a tiny llama", tuple(choices))


@dataclass(frozen=True, eq=False)
class ExactFront:
    """All allocations of a space with what they cost and damage.

    Attributes:
        levels: (n, n_choices).
        damages: (n,), nats per token.
        n_bytes: (n,), of the searched layers.
        space: what the levels mean.
    """

    levels: NDArray[np.int64]
    damages: Floats
    n_bytes: Floats
    space: SearchSpace

    @property
    def points(self) -> Floats:
        """(n, 2): log10 of damage, bytes."""
        return np.column_stack([np.log10(np.maximum(self.damages, 1e-9)), self.n_bytes])

    @property
    def best(self) -> NDArray[np.int64]:
        """Indices of the allocations that no other beats."""
        return np.flatnonzero(non_dominated(self.points))

    def index(self, levels: Sequence[int]) -> int:
        """Row of an allocation."""
        sizes = [len(choice.options) for choice in self.space.choices]
        return int(np.ravel_multi_index(tuple(levels), sizes))

    def save(self, path: Path) -> None:
        """Write damages alone: levels and bytes follow from the space."""
        text = json.dumps(self.space.to_json()).encode()
        header = np.frombuffer(text, dtype=np.uint8)
        np.savez_compressed(path, space=header, damages=self.damages.astype(np.float32))

    @classmethod
    def load(cls, path: Path) -> ExactFront:
        """The inverse of `save`."""
        with np.load(path, allow_pickle=False) as file:
            space = SearchSpace.from_json(json.loads(file["space"].tobytes()))
            damages = file["damages"].astype(np.float64)
        return cls.of(space, damages)

    @classmethod
    def of(cls, space: SearchSpace, damages: Floats) -> ExactFront:
        """From the damages of all allocations, the last choice fastest."""
        sizes = [range(len(choice.options)) for choice in space.choices]
        levels = np.array(list(itertools.product(*sizes)), dtype=np.int64)
        n_bytes = np.zeros(len(levels))
        for choice, column in zip(space.choices, levels.T, strict=True):
            n_bytes += np.array([float(o.storage_bytes) for o in choice.options])[column]
        return cls(levels, damages, n_bytes, space)
