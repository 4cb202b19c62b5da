"""Shapes of decoders that are too large to run here: what a budget is counted from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autocompress.core import LayerSpec


@dataclass(frozen=True, slots=True)
class Matrix:
    """A kind of layer: `count` matrices (out, in), of which a token uses `active`.

    Attributes:
        inputs: distinct inputs that no kind before it reads; each has its own H and factor.
    """

    role: str
    out_features: int
    in_features: int
    count: int
    active: int
    inputs: int

    @property
    def n_weights(self) -> int:
        """Of all `count` matrices."""
        return self.out_features * self.in_features * self.count

    @property
    def spec(self) -> LayerSpec:
        """One of them, as layouts of compressed layers need it."""
        o, d = self.out_features, self.in_features
        return LayerSpec(self.role, "other", 0, o, d, "linear", "bfloat16", self.role, o * d)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder; its embedding and head stay as they are, norms are left out.

    Attributes:
        like: the public model whose configuration this is.
        experts: per expert layer, of which a token uses one; 1 for a dense model.
    """

    like: str
    blocks: int
    width: int
    vocabulary: int
    matrices: tuple[Matrix, ...]
    experts: int = 1

    @property
    def searched_weights(self) -> int:
        """Of the blocks."""
        return sum(m.n_weights for m in self.matrices)

    @property
    def weights(self) -> int:
        """With embedding and head."""
        return self.searched_weights + 2 * self.vocabulary * self.width

    @property
    def active_weights(self) -> int:
        """That one token is multiplied with, the head included."""
        used = sum(m.out_features * m.in_features * m.active for m in self.matrices)
        return used + self.vocabulary * self.width

    @property
    def choices(self) -> int:
        """One per matrix that a token uses: the experts of a layer are tied."""
        return sum(m.active for m in self.matrices)


def decoder_matrices(
    blocks: int, width: int, key_width: int, mlps: Sequence[tuple[str, int, int, int]]
) -> tuple[Matrix, ...]:
    """Attention of every block, then gated MLPs.

    Args:
        blocks: of the decoder.
        width: of the residual stream and of the queries.
        key_width: of keys and of values.
        mlps: name, hidden width, how many there are, how many a token uses; each reads an input
            of its own.
    """
    found = [
        Matrix("query", width, width, blocks, blocks, blocks),
        Matrix("key, value", key_width, width, 2 * blocks, 2 * blocks, 0),
        Matrix("output", width, width, blocks, blocks, blocks),
    ]
    for name, hidden, count, active in mlps:
        found.append(Matrix(f"{name} gate, up", hidden, width, 2 * count, 2 * active, count))
        found.append(Matrix(f"{name} down", width, hidden, count, active, count))
    return tuple(found)


ARCHITECTURES = {
    "7B": Architecture(
        "Llama 2 7B", 32, 4096, 32000,
        decoder_matrices(32, 4096, 4096, [("mlp", 11008, 32, 32)]),
    ),
    "70B": Architecture(
        "Llama 3 70B", 80, 8192, 128256,
        decoder_matrices(80, 8192, 1024, [("mlp", 28672, 80, 80)]),
    ),
    "400B MoE": Architecture(
        "Llama 4 Maverick", 48, 5120, 202048,
        decoder_matrices(48, 5120, 1024, [
            ("mlp", 16384, 24, 24), ("shared expert", 8192, 24, 24),
            ("expert", 8192, 24 * 128, 24),
        ]),
        experts=128,
    ),
}  # fmt: skip
