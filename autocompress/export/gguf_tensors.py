"""All tensors of a GGUF file: compressed layers in blocks, the rest as it is in the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autocompress.core import LayerSpec
from autocompress.export.gguf_blocks import FLOAT_TYPES, Bytes, float_bytes, to_blocks
from autocompress.export.gguf_models import (
    extra_tensors,
    plain_tensor,
    stored_rows,
    tensor_names,
)
from autocompress.methods import CompressedWeight
from autocompress.models import BaseModel, weight_matrix


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """One tensor of the file.

    Attributes:
        name: in the file.
        ggml: name of its type.
        rows: (..., bytes per row) uint8.
        layer: the compressed layer that it holds; empty if none.
        note: what became of that layer's codes.
    """

    name: str
    ggml: str
    rows: Bytes
    layer: str = ""
    note: str = ""


def model_tensors(
    base: BaseModel, weights: Mapping[str, CompressedWeight], targets: Mapping[str, str]
) -> Iterator[StoredTensor]:
    """The tensors of a model, in the order of its modules, tied ones once.

    Args:
        base: model that was compressed; of an architecture that GGUF has.
        weights: compressed layers by name.
        targets: GGUF type of each of them.

    Raises:
        CheckpointError: blocks do not decode to the very matrix, as they should.
    """
    config: Any = base.module.config
    layers = {f"{layer.name}.weight": layer for layer in base.layout.layers}
    state = base.module.state_dict()
    for name, tensor in extra_tensors(base.module):
        yield StoredTensor(name, "F32", float_bytes(tensor, "F32"))
    for name, stored in tensor_names(base.module).items():
        if name in layers:
            yield _layer_tensor(base, layers[name], stored, weights, targets)
        else:
            values = plain_tensor(stored, state[name], config)
            yield StoredTensor(stored, "F32", float_bytes(values, "F32"))


def _layer_tensor(
    base: BaseModel,
    layer: LayerSpec,
    name: str,
    weights: Mapping[str, CompressedWeight],
    targets: Mapping[str, str],
) -> StoredTensor:
    order = stored_rows(name, layer.out_features, base.module.config)
    if layer.name in weights:
        ggml = targets[layer.name]
        rows, note = to_blocks(weights[layer.name], ggml)
    else:
        ggml, note = FLOAT_TYPES[layer.dtype], ""
        rows = float_bytes(weight_matrix(base.module, layer), ggml)
    if order is not None:
        rows = rows[order.numpy()]
    return StoredTensor(name, ggml, rows, layer.name if note else "", note)
