"""The form of a space file: strict, and independent of any model. Imports no torch."""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from autocompress.core.layer import Role
from autocompress.core.scheme import OptionValue

STAGE_KEYS: tuple[str, ...] = (
    "share", "width", "transform", "factorize", "sparsify", "quantize", "residual", "inputs",
)  # fmt: skip
"""Keys of a grid, in the order in which a scheme applies its stages."""

NONE = "none"
"""The alternative of a stage that leaves the stage out."""


def _form(value: object) -> str:
    """Which branch of a union a value is meant for, so that messages are about that branch."""
    return "mapping" if isinstance(value, dict | BaseModel) else "text"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Ties(_Strict):
    """Which layers of a block must take the same option, so that fused kernels stay possible."""

    qkv: bool = Field(
        default=True,
        description="query, key and value of a block; cross_key and cross_value of a block.",
    )
    gate_up: bool = Field(default=True, description="gate and up of a block.")
    sublayers: bool = Field(
        default=False,
        description="All layers of a block's attention take one option, likewise of its "
        "cross-attention and of its feed-forward part: each can be dropped as a whole.",
    )
    expert_groups: int = Field(
        default=1,
        ge=0,
        description="Parts of equal size that the experts of a block are cut into; the layers of "
        "one role in a part take one option. 0: every expert for itself.",
    )
    whole_experts: bool = Field(
        default=False,
        description="All layers of an expert take one option: gate_up, or up, and down.",
    )
    experts_by: Literal["routing", "index"] = Field(
        default="routing",
        description="What the experts are sorted by before they are cut: how many calibration "
        "tokens are sent to them, most first, or their number.",
    )


class StageGrid(BaseModel):
    """One method; each option is a value or a list of values, expanded as a product.

    Besides the method's own options: `parameter_ratio` of a factorize method, the kept share of
    the layer's parameters, resolved to a rank against each layer's shape.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, OptionValue | list[OptionValue]]

    method: str = Field(description="Name of a method, as `autocompress methods` lists them.")


StageAlternative = Annotated[
    Annotated[
        str,
        Tag("text"),
        Field(description="`none`, or a stage such as `gptq(bits=4)`."),
    ]
    | Annotated[StageGrid, Tag("mapping")],
    Discriminator(_form),
]
Alternatives = Annotated[list[StageAlternative], Field(min_length=1)]


class Grid(_Strict):
    """The product of alternatives for each stage; a key that is absent leaves its stage out."""

    share: Alternatives = [NONE]
    width: Alternatives = [NONE]
    transform: Alternatives = [NONE]
    factorize: Alternatives = [NONE]
    sparsify: Alternatives = [NONE]
    quantize: Alternatives = [NONE]
    residual: Alternatives = [NONE]
    inputs: Alternatives = [NONE]


OptionSpec = Annotated[
    Annotated[
        str,
        Tag("text"),
        Field(description="A scheme: `base`, or `svd_llm(parameter_ratio=0.6)+rtn(bits=8)`."),
    ]
    | Annotated[Grid, Tag("mapping")],
    Discriminator(_form),
]


class ChoiceSpec(_Strict):
    """Options for the layers that meet every selector given (roles, layers, blocks)."""

    roles: Annotated[list[Role], Field(min_length=1)] | None = Field(
        None, description="Layers of any of these roles."
    )
    layers: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Layers whose name (or the name of a tied module) matches a pattern."
    )
    blocks: Annotated[list[int], Field(min_length=1)] | None = Field(
        None, description="Layers of these blocks; negative numbers count from the last block."
    )
    span: Annotated[int, Field(ge=1)] = Field(
        1,
        description="Layers of this many adjacent blocks take one option together, and may share.",
    )
    optional: bool = Field(False, description="True: a model that has no such layer is no error.")
    options: Annotated[list[OptionSpec], Field(min_length=1)]

    @model_validator(mode="after")
    def _selects(self) -> Self:
        if self.roles is None and self.layers is None and self.blocks is None:
            raise ValueError("needs at least one of roles, layers, blocks")
        return self


class SpaceSpec(_Strict):
    """A search space: what may be chosen for which layers of any transformer."""

    schema_version: Literal[1]
    name: str = Field(min_length=1)
    description: str = Field(min_length=1, description="One line.")
    ties: Ties = Ties()
    choices: Annotated[list[ChoiceSpec], Field(min_length=1)] = Field(
        description="A layer belongs to the first choice that selects it."
    )


def json_schema() -> str:
    """The text of ``space.schema.json``."""
    schema = SpaceSpec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
