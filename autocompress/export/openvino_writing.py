"""Write an OpenVINO model, and hold it to what torch computes before anyone sees it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import openvino
import torch
from torch import Tensor, nn

from autocompress.core.errors import CheckpointError
from autocompress.export.openvino_client import compiled
from autocompress.export.openvino_forms import Form, batch_of, float32_copy, form_of
from autocompress.export.openvino_graph import (
    constants_by_address,
    converted,
    make_stateful,
    replace_layer,
    shorten,
)
from autocompress.export.openvino_rotation import Rotation
from autocompress.export.openvino_weights import note, rotation_seed, stored_matrices
from autocompress.methods import CompressedWeight, decode
from autocompress.models import BaseModel, overridden
from autocompress.models.layout import describe

AGREEMENT = 1e-3
"""How far the outputs of the two runtimes may lie apart, as a share of the largest."""

Notes = dict[str, tuple[str, ...]]


def write_model(
    base: BaseModel, weights: Mapping[str, CompressedWeight], path: Path
) -> tuple[nn.Module, Form, Notes]:
    """Write the graph to `path` and its constants beside it.

    Returns:
        The base model in float32, what it reads and writes, and notes by layer.
    """
    model, dtypes = float32_copy(base.module)
    form = form_of(model, base.auto_class, _input_names(base))
    graph = converted(model, form)
    constants = constants_by_address(graph)
    notes: Notes = {}
    rotations = cache(Rotation)  # of this graph
    for name, weight in weights.items():
        dense = cast(Tensor, model.get_submodule(name).weight)
        nodes = constants.pop(dense.data_ptr(), [])
        if not nodes:
            notes[name] = (*weight.notes, "left out: no output depends on it")
            continue
        matrices = stored_matrices(weight)
        seed = rotation_seed(weight.scheme)
        rotation = None if seed is None else rotations(weight.shape[1], seed)
        replace_layer(nodes, name, matrices, rotation)
        notes[name] = (*weight.notes, note(matrices, weight.scheme))
    for address, dtype in dtypes.items():
        shorten(constants.get(address, []), dtype)
    if form.cache:
        make_stateful(graph, form)
    openvino.save_model(graph, path, compress_to_fp16=False)
    return model, form, notes


def check_written(
    model: nn.Module,
    form: Form,
    base: BaseModel,
    weights: Mapping[str, CompressedWeight],
    directory: Path,
) -> None:
    """Compare the written file with torch, on inputs of other sizes than it was traced with.

    Raises:
        CheckpointError: they do not agree.
    """
    batch = batch_of(model, form.inputs, n=3, length=11, padded=2)
    found = compiled(directory, config=model.config)(**batch)
    layout = describe(model)
    dense = {
        name: decode(w.tensors, w.scheme, w.shape, torch.float32) for name, w in weights.items()
    }
    with torch.no_grad(), overridden(model, layout, dense):
        expected = model(**batch)
    for name in form.outputs:
        difference = _difference(getattr(found, name), expected[name], batch)
        if not difference <= AGREEMENT:
            raise CheckpointError(
                f"OpenVINO must compute what torch computes, but its {name} of this "
                f"{type(base.module).__name__} differ by {difference:.2g} of the largest. Nothing "
                "was written. Next step: export --format packed."
            )


def _difference(found: Tensor, expected: Tensor, batch: Mapping[str, Tensor]) -> float:
    """Largest difference as a share of the largest value; padding does not count."""
    mask = batch.get("attention_mask")
    if mask is not None and found.dim() == 3:
        found, expected = found[mask > 0], expected[mask > 0]
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _input_names(base: BaseModel) -> tuple[str, ...]:
    names = getattr(base.processor, "model_input_names", None)
    main: Any = base.module.main_input_name
    return tuple(dict.fromkeys((main, *(names or ()))))
