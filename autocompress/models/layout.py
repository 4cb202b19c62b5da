"""What of a model can be compressed: one discovery for every transformer architecture.

Nothing here knows a model by name. Blocks are the outermost lists of modules that each hold
attention or feed-forward projections; the role of a layer is read off its attribute path with the
one table `_ROLES`; ties are tensors that are the same object. A new architecture normally needs no
code, at most a word in that table. Experts are layers once `separate_experts` has run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autocompress.core import DTYPE_BYTES, ROLES, LayerSpec
from autocompress.core.errors import ModelError, nearest
from autocompress.core.layer import Kind, Role
from autocompress.models.experts import expert_of

# The first pattern that matches the end of a layer's path within its block decides.
_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = tuple(
    (cast(Role, role), re.compile(rf"(?:^|\.)(?:{names})$"))
    for role, names in (
        ("qkv", r"c_attn|qkv|qkv_proj|query_key_value|Wqkv|attention\.self\.in_proj"),
        # Low-rank attention (MLA): the halves of a projection read, and put out, different things.
        ("qkv", r"q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj"),
        ("query", r"q_proj|query_proj|query|q_lin|q_attn|q"),
        ("key", r"k_proj|key_proj|key|k_lin|k"),
        ("value", r"v_proj|value_proj|value|v_lin|v"),
        ("output", r"o_proj|out_proj|out_lin|o|(?:self_)?attn\.(?:c_proj|proj|dense|Wo)"),
        ("output", r"(?:self_)?(?:cross)?attention\.(?:(?:output\.)?dense|proj)"),
        ("gate_up", r"gate_up_proj|Wi|weights_in"),
        ("gate", r"gate_proj|wi_0|feed_forward\.w1"),
        ("up", r"up_proj|fc1|lin1|wi|wi_1|c_fc|intermediate\.dense|dense_h_to_4h"),
        ("up", r"fc_in|ffn|feed_forward\.w3|mlp\.dense1"),
        ("router", r"(?:mlp|moe|feed_forward)\.gate(?:\.wg)?|router(?:\.\w+)?|shared_expert_gate"),
        ("down", r"down_proj|fc2|lin2|wo|mlp\.c_proj|output\.dense|dense_4h_to_h"),
        ("down", r"fc_out|ffn_output|feed_forward\.w2|Wo|weights_out|mlp\.dense2"),
    )
)
_CROSS_ATTENTION = re.compile(
    r"(?:^|\.)(?:encoder_attn|EncDecAttention|crossattention|cross_attn)\."
)
# Tables of learned positions. Subclasses that count positions themselves are no lookups by id.
_POSITION = re.compile(r"(?:^|\.)(?:position_embeddings?|positions?_embed|embed_positions|wpe)$")
# Heads that `get_output_embeddings` does not name: those of classifiers.
_HEAD = re.compile(
    r"(?:^|\.)(?:classifier|score|qa_outputs)$|(?:classifier|classification_head)\.out_proj$"
)
# Roles whose layers read one input when they sit side by side in the same parent module and are of
# one width. Not in every architecture: `reads.as_read` holds it to what a forward does.
_SIBLINGS: Mapping[Role, str] = {
    "query": "attention", "key": "attention", "value": "attention",
    "gate": "feed_forward", "up": "feed_forward",
}  # fmt: skip


_MUCH = 0.2
"""Share of the weights in blocks above which layers of no known role are worth a line."""
_SHOWN = 3
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_per_head", "d_kv")
"""What modules of attention call the width of a head."""
_BY_HEADS: Mapping[Role, str] = {
    "query": "out", "key": "out", "value": "out", "output": "in",
    "cross_query": "out", "cross_key": "out", "cross_value": "out", "cross_output": "in",
}  # fmt: skip
"""Which side of a layer is made of heads."""


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """The compressible layers of a model and the bytes of all the rest.

    Attributes:
        layers: every compressible layer: the token embedding, positions, then the blocks, then what
            follows them (pooler, head), in the order in which the model registers its modules.
        blocks: fully qualified name of each transformer block, encoder blocks first.
        other_bytes: bytes of all parameters and persistent buffers that are no layer's weight
            (biases, norms, token types, convolutions), each tied tensor once.
        other_macs_per_token: multiply-accumulates of convolutions, per output position.
    """

    layers: tuple[LayerSpec, ...]
    blocks: tuple[str, ...]
    other_bytes: int
    other_macs_per_token: int
    _index: dict[str, LayerSpec] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {layer.name: layer for layer in self.layers})

    @property
    def base_bytes(self) -> int:
        """Bytes of the tensors that `save_pretrained` writes."""
        return sum(layer.base_bytes for layer in self.layers) + self.other_bytes

    def layer(self, name: str) -> LayerSpec:
        """The layer called `name`.

        Raises:
            ModelError: there is none; an alias of a tied layer is answered with the layer's name.
        """
        found = self._index.get(name)
        if found is not None:
            return found
        for layer in self.layers:
            if name in layer.aliases:
                raise ModelError(
                    f"{name!r} holds the very tensor of {layer.name!r}. Use {layer.name!r}."
                )
        raise ModelError(f"The model has no layer {name!r}. {nearest(name, self._index)}")

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return {
            "layers": [layer.to_json() for layer in self.layers],
            "blocks": list(self.blocks),
            "other_bytes": self.other_bytes,
            "other_macs_per_token": self.other_macs_per_token,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelLayout:
        """The inverse of `to_json`."""
        return cls(
            layers=tuple(LayerSpec.from_json(layer) for layer in data["layers"]),
            blocks=tuple(data["blocks"]),
            other_bytes=int(data["other_bytes"]),
            other_macs_per_token=int(data["other_macs_per_token"]),
        )


def describe(module: nn.Module) -> ModelLayout:
    """Find the layers, roles, ties and blocks of a model. Reads shapes only: meta tensors will do.

    Which layers read one input is taken from names and widths; `reads.as_read` knows better.

    A pooler or the dense layer of a prediction head is a layer of role ``other`` outside the
    blocks: it can be compressed by a space that asks for that role. Layers that run once per
    sequence (pooler, classifier) are counted as if they ran per token, an upper bound.

    Raises:
        ModelError: the module has no transformer block.
    """
    blocks = tuple(_find_blocks(module))
    if not blocks:
        raise ModelError(f"A model must hold a list of transformer blocks, {_no_blocks(module)}")
    weights = tuple(_layer_weights(module))
    inputs = _Inputs(blocks)
    return ModelLayout(
        layers=tuple(_layer(module, names, blocks, inputs) for names in weights),
        blocks=blocks,
        other_bytes=_other_bytes(module, weights),
        other_macs_per_token=_convolution_macs(module),
    )


def unnamed_roles(layout: ModelLayout) -> str:
    """What to say of a model whose blocks are to a good part layers of no known role; else empty.

    Spaces are written by role, and offer such layers little.
    """
    inside = [layer for layer in layout.layers if layer.block is not None]
    unnamed = [layer for layer in inside if layer.role == "other"]
    share = sum(x.n_weights for x in unnamed) / max(1, sum(x.n_weights for x in inside))
    if share <= _MUCH:
        return ""
    paths = dict.fromkeys("*." + ".".join(layer.name.split(".")[-2:]) for layer in unnamed)
    shown, more = list(paths)[:_SHOWN], len(paths) - _SHOWN
    return (
        f"{share:.0%} of the weights in the blocks belong to layers of no known role "
        f"({', '.join(shown)}{f' and {more} more' if more > 0 else ''}): most spaces offer them "
        "little. Next step: name them under `layers:` in a space of your own."
    )


def kind_of(module: nn.Module) -> Kind | None:
    """How a module stores its weight matrix; None if it is not a layer."""
    if isinstance(module, nn.Linear):
        return None if hasattr(module, "top_k") else "linear"  # a router puts out its choice
    if isinstance(module, Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else None


def _find_blocks(module: nn.Module) -> Iterator[str]:
    inside: tuple[str, ...] = ()
    for name, child in module.named_modules():
        nested = name.startswith(inside)
        if isinstance(child, nn.ModuleList) and not nested and _holds_blocks(child):
            inside = (*inside, f"{name}.")
            yield from (f"{name}.{i}" for i in range(len(child)))


def _holds_blocks(modules: nn.ModuleList) -> bool:
    """Blocks may be of several classes (attention and recurrence in turn) if each has a role."""
    one_class = len({type(child) for child in modules}) == 1
    return len(modules) > 0 and all(map(_has_role, [modules[0]] if one_class else modules))


def _has_role(block: nn.Module) -> bool:
    return any(
        kind_of(child) in ("linear", "conv1d") and _role_in_block(name) != "other"
        for name, child in block.named_modules()
    )


def _no_blocks(module: nn.Module) -> str:
    """Why none was found, as far as it can be told."""
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and any(map(_has_role, child)):
            without = sorted({type(block).__name__ for block in child if not _has_role(block)})
            return (
                f"but in {name!r} of {type(module).__name__} some, {' and '.join(without)}, hold "
                "no projection of a known role. Next step: take a model whose blocks all hold "
                "attention or a feed-forward network."
            )
    return f"but none was found in {type(module).__name__}. Load it with a transformers Auto class."


def _role_in_block(path: str) -> Role:
    """Role of the layer at `path` within its block."""
    role = next((role for role, pattern in _ROLES if pattern.search(path)), None)
    if role is None:
        return "other"
    if _CROSS_ATTENTION.search(path):
        crossed = f"cross_{role}"
        return cast(Role, crossed) if crossed in ROLES else "other"
    return role


def _layer_weights(module: nn.Module) -> Iterator[tuple[str, ...]]:
    """For each distinct layer weight, the names of the modules that hold it, the saved name first.

    Transformers saves a tied tensor under the name of the token embedding; other ties under the
    first name. Tables of learned positions are layers; embeddings of other things (token types,
    relative biases) are not unless a linear layer holds the same tensor.
    """
    token_embedding = _call_if_present(module, "get_input_embeddings")
    holders: dict[int, list[str]] = {}
    layers: set[int] = set()
    for name, child in module.named_modules(remove_duplicate=False):
        kind = kind_of(child)
        if kind is None:
            continue
        names = holders.setdefault(id(child.weight), [])
        names.insert(0 if child is token_embedding else len(names), name)
        if kind != "embedding" or child is token_embedding or _holds_positions(name, child):
            layers.add(id(child.weight))
    yield from (tuple(names) for key, names in holders.items() if key in layers)


def _holds_positions(name: str, child: nn.Module) -> bool:
    return type(child) is nn.Embedding and bool(_POSITION.search(name))


def _call_if_present(module: nn.Module, method: str) -> nn.Module | None:
    """Result of a transformers accessor; None if the model has no such part."""
    accessor = getattr(module, method, None)
    try:
        found = accessor() if accessor is not None else None
    except (NotImplementedError, AttributeError):  # "this architecture has no embeddings"
        return None
    return found if isinstance(found, nn.Module) else None


def _layer(
    module: nn.Module, holders: tuple[str, ...], blocks: tuple[str, ...], inputs: _Inputs
) -> LayerSpec:
    name = holders[0]
    child = module.get_submodule(name)
    kind = cast(Kind, kind_of(child))
    weight = cast(Tensor, child.weight)
    rows, columns = weight.shape if kind != "conv1d" else weight.shape[::-1]
    block = _block_of(name, blocks)
    expert = expert_of(module, name)
    within = name if expert is None else name.rpartition(".")[0]
    role = _role(module, name, kind, None if block is None else within[len(blocks[block]) + 1 :])
    macs = rows * columns if expert is None else expert.active(rows * columns)
    linears = [h for h in holders if kind_of(module.get_submodule(h)) != "embedding"]
    return LayerSpec(
        name=name,
        role=role,
        block=block,
        out_features=rows,
        in_features=columns,
        kind=kind,
        dtype=str(weight.dtype).removeprefix("torch."),
        input_name=inputs.name(linears[0], role, block, columns) if linears else None,
        macs_per_token=macs if linears else 0,
        aliases=holders[1:],
        expert=expert,
        heads=None if block is None else _heads(module, name, role, blocks[block], (rows, columns)),
    )


def _heads(
    module: nn.Module, name: str, role: Role, block: str, shape: tuple[int, int]
) -> int | None:
    """See `LayerSpec.heads`: the nearest module around the layer that knows the width decides."""
    if role not in _BY_HEADS:
        return None
    size, holder = shape[0 if _BY_HEADS[role] == "out" else 1], name
    while holder != block:
        holder = holder.rpartition(".")[0]
        for child in module.get_submodule(holder).modules():
            width = next((getattr(child, n) for n in _HEAD_WIDTHS if hasattr(child, n)), None)
            if isinstance(width, int) and width > 0 and size % width == 0:
                return size // width
    return None


def _role(module: nn.Module, name: str, kind: Kind, in_block: str | None) -> Role:
    if kind == "embedding":
        return "position" if _POSITION.search(name) else "embedding"
    if in_block is not None:
        return _role_in_block(in_block)
    is_head = module.get_submodule(name) is _call_if_present(module, "get_output_embeddings")
    return "head" if is_head or _HEAD.search(name) else "other"


def _block_of(name: str, blocks: tuple[str, ...]) -> int | None:
    return next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), None)


class _Inputs:
    """Names the input of each layer after the first layer that reads it."""

    def __init__(self, blocks: tuple[str, ...]) -> None:
        self._blocks = blocks
        self._first: dict[tuple[str, str, int], str] = {}

    def name(self, layer: str, role: Role, block: int | None, width: int) -> str:
        return self._first.setdefault((*self._key(layer, role, block), width), layer)

    def _key(self, layer: str, role: Role, block: int | None) -> tuple[str, str]:
        if block is not None and role in ("cross_key", "cross_value"):
            # All blocks of a decoder read the encoder's output.
            return self._blocks[block].rpartition(".")[0], "encoder_output"
        if block is not None and role in _SIBLINGS:
            return layer.rpartition(".")[0], _SIBLINGS[role]
        return layer, ""


def _other_bytes(module: nn.Module, weights: tuple[tuple[str, ...], ...]) -> int:
    layer_weights = {id(module.get_submodule(names[0]).weight) for names in weights}
    not_saved = frozenset(getattr(module, "_keys_to_ignore_on_save", None) or ())
    others = {
        id(tensor): tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if id(tensor) not in layer_weights and name not in not_saved
    }
    return sum(t.numel() * DTYPE_BYTES[str(t.dtype)[len("torch.") :]] for t in others.values())


def _convolution_macs(module: nn.Module) -> int:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return sum(child.weight.numel() for child in module.modules() if isinstance(child, kinds))
