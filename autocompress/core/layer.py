"""What the search needs to know about one compressible layer, without its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Role = Literal[
    "query", "key", "value", "qkv", "output", "gate", "up", "gate_up", "down",
    "cross_query", "cross_key", "cross_value", "cross_output",
    "router", "embedding", "position", "head", "other",
]  # fmt: skip
ROLES: tuple[str, ...] = get_args(Role)

Kind = Literal["linear", "conv1d", "embedding"]
"""How the module stores its weight: `linear` (out, in); `conv1d` (in, out), as GPT-2 does;
`embedding` (rows, width)."""

Among = Literal["blocks", "experts"]
"""What layers that share belong to; by its number in their names they differ."""

BLOCKS: Among = "blocks"
EXPERTS: Among = "experts"

_IF_ANY = ("expert", "heads")
"""Left out of the JSON of a layer where there is none."""

DTYPE_BYTES: dict[str, int] = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertOf:
    """Which of the experts of a block a layer belongs to.

    Attributes:
        index: of the expert, from 0.
        n_experts: experts of the block.
        per_token: experts that a token is sent to.
    """

    index: int
    n_experts: int
    per_token: int

    def active(self, cost: int) -> int:
        """What a token costs on average in this expert, of a `cost` if it is sent there."""
        return cost * self.per_token // self.n_experts

    def reached(self, n_tokens: int) -> float:
        """Chance that any of `n_tokens` is sent to this expert, where all are as likely."""
        return 1.0 - (1.0 - self.per_token / self.n_experts) ** n_tokens


@dataclass(frozen=True, slots=True)
class Place:
    """A layer's name around its first number: `before` and `after` it.

    Layers whose places differ in the number alone do the same in other blocks of one stack. Of an
    expert there is a place around the last number too, which is that of the expert.
    """

    before: str
    number: int
    after: str

    @classmethod
    def of(cls, name: str) -> Place | None:
        """The place that a name says; None if no part of it is a number."""
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if first is None:
            return None
        return cls(".".join(parts[:first]), int(parts[first]), ".".join(parts[first + 1 :]))

    @classmethod
    def of_expert(cls, name: str) -> Place | None:
        """The place among the experts of a block: around the last part; None if it says none."""
        stack, _, number = name.rpartition(".")
        block = cls.of(stack)
        return cls(stack, int(number), "") if number.isdecimal() and block is not None else None

    def at(self, number: int) -> str:
        """The name of the layer that stands there in block, or is of expert, `number`."""
        return ".".join(part for part in (self.before, str(number), self.after) if part)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One compressible layer.

    The weight is always seen as a matrix of shape ``(out_features, in_features)`` whatever the
    module stores; quantization groups run along `in_features`.

    Attributes:
        name: fully qualified name of the module.
        role: what the layer is in its block; search spaces are written by role.
        block: index of the transformer block in execution order (encoder blocks first), or None
            outside the blocks (embedding, positions, head, pooler).
        out_features: rows of the weight matrix.
        in_features: columns of the weight matrix.
        kind: how the module stores the weight.
        dtype: dtype of the base weight in the checkpoint, as torch spells it without the prefix.
        input_name: layers with equal `input_name` read the same activations and share statistics
            (query, key and value; gate and up). None: the input is not a vector of activations
            (an embedding that is not also the head).
        macs_per_token: multiply-accumulates that the base layer costs per token; 0 for a lookup;
            of an expert the share of the tokens that are sent to it.
        aliases: names of other modules that hold this very tensor (a head tied to the embedding).
        expert: which expert of a mixture the layer is a part of; None if of none.
        heads: heads that the outputs of a query, key or value, or the inputs of an attention's
            output, are made of; None if it is none of these, or the model does not say.
    """

    name: str
    role: Role
    block: int | None
    out_features: int
    in_features: int
    kind: Kind
    dtype: str
    input_name: str | None
    macs_per_token: int
    aliases: tuple[str, ...] = ()
    expert: ExpertOf | None = None
    heads: int | None = None

    @property
    def place(self) -> Place | None:
        """Where the layer stands in a list of blocks; None if its name has no number."""
        return Place.of(self.name)

    @property
    def n_weights(self) -> int:
        """Number of weights (the bias is not one of them)."""
        return self.out_features * self.in_features

    @property
    def base_bytes(self) -> int:
        """Bytes of the uncompressed weight."""
        return self.n_weights * DTYPE_BYTES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if data["expert"] is not None:
            data["expert"] = asdict(data["expert"])
        return {name: value for name, value in data.items() if name not in _IF_ANY or value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerSpec:
        """The inverse of `to_json`."""
        expert = data.get("expert")
        found = None if expert is None else ExpertOf(**expert)
        return cls(**{**data, "aliases": tuple(data.get("aliases", ())), "expert": found})
