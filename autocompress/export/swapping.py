"""Turn the layers of a model into packed modules, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autocompress.core.errors import CheckpointError, SchemeError
from autocompress.export.modules import (
    PackedModule,
    borrow,
    empty_tensors,
    pack_module,
    packs,
    weight_shape,
)
from autocompress.export.plan import PackedLayer, PackedPlan
from autocompress.export.tensor_file import read_header
from autocompress.methods import require_whole, sharing_layers
from autocompress.models.experts import separate_experts


def swap_modules(
    model: nn.Module,
    plan: PackedPlan,
    dtype: torch.dtype,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> PackedPlan:
    """Replace the weights of the planned layers by stored tensors.

    A checkpoint may be loaded into a model with another head (`AutoModel` for a language model):
    layer names then differ by the model's base prefix, and layers that the model does not have
    are left out.

    Args:
        model: a transformers model, typically on the meta device.
        plan: layers of the checkpoint.
        dtype: what the model computes in. A layer that the base model keeps in another dtype than
            the rest (T5's ``wo`` in float32) computes in that one.
        tensors: stored tensors by layer; None makes empty ones on the device of the weight.

    Returns:
        The layers that were replaced, under their names in this model.

    Raises:
        CheckpointError: a layer does not fit its module, or is named twice.
    """
    if plan.separate_experts:
        separate_experts(model)
    found = tuple(
        located for layer in plan.layers if (located := _locate(model, layer)) is not None
    )
    holders = [(name, layer) for _, layer in found for name in (layer.name, *layer.aliases)]
    for name, layer in holders:
        _require_fit(model.get_submodule(name), layer, name)
    names = {name for name, _ in holders}
    if len(names) < len(holders):
        twice = next(n for i, (n, _) in enumerate(holders) if n in dict(holders[:i]))
        raise CheckpointError(f"The checkpoint names {twice} twice. Export it again.")
    _forget_ties(model, names)
    for original, layer in found:
        compute = dtype if layer.dtype == plan.dtype else getattr(torch, layer.dtype)
        _swap(model, layer, compute, None if tensors is None else tensors[original])
    _lend(model, [layer for _, layer in found])
    return replace(plan, layers=tuple(layer for _, layer in found))


def require_sound(model: nn.Module, files: Sequence[Path]) -> None:
    """Make sure that packed layers hold what a compression may have written.

    Checksums tell damage before this; it is for files that have none, or were written so.

    Args:
        model: its packed layers loaded.
        files: that they were loaded from.

    Raises:
        CheckpointError: names the file, the layer and the tensor.
    """
    for name, module in model.named_modules():
        found = module.damage() if isinstance(module, PackedModule) else None
        if found is not None:
            tensor = f"{name}.{found.tensor}"
            path = next((path for path in files if _holds(path, tensor)), "The checkpoint")
            raise CheckpointError(
                f"{path} is damaged: tensor {tensor} of layer {name} {found.reason}. Next step: "
                "copy the checkpoint again, or export it again."
            )


def _holds(path: Path, tensor: str) -> bool:
    """Whether the file has the tensor, maybe under a name with another prefix."""
    return any(name.endswith(tensor) or tensor.endswith(name) for name in read_header(path))


def _swap(
    model: nn.Module,
    layer: PackedLayer,
    compute: torch.dtype,
    tensors: Mapping[str, Tensor] | None,
) -> None:
    module = model.get_submodule(layer.name)
    if tensors is None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        tensors = empty_tensors(layer.tensors(), weight.device)
    owner = pack_module(module, layer, tensors, compute)
    for alias in layer.aliases:
        other = model.get_submodule(alias)
        if other is not owner:
            pack_module(other, layer, {}, compute, owner)


def _lend(model: nn.Module, layers: Sequence[PackedLayer]) -> None:
    """Layers that share decode with what the first of them stores.

    Raises:
        CheckpointError: the layers that a scheme names do not all have it.
    """
    try:
        require_whole({layer.name: layer.scheme for layer in layers})
    except SchemeError as error:
        raise CheckpointError(
            f"The checkpoint stores layers that share, but not all of them: {error} Next step: "
            "export it again."
        ) from error
    for layer in layers:
        lender = sharing_layers(layer.name, layer.scheme)[0]
        if lender != layer.name:
            module, other = model.get_submodule(layer.name), model.get_submodule(lender)
            assert isinstance(module, PackedModule)
            assert isinstance(other, PackedModule)
            borrow(module, other)


def _locate(model: nn.Module, layer: PackedLayer) -> tuple[str, PackedLayer] | None:
    """Its name in the file, and the layer under its names in `model`; None if it has none."""
    name = _resolve(model, layer.name)
    if name is None:
        return None
    aliases = tuple(a for alias in layer.aliases if (a := _resolve(model, alias)) is not None)
    renamed = PackedLayer(name, layer.scheme, layer.shape, layer.dtype, layer.kind, aliases)
    return layer.name, renamed


def _resolve(model: nn.Module, name: str) -> str | None:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    candidates = (name, prefix + name, name.removeprefix(prefix))
    return next((c for c in candidates if _has(model, c)), None)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _require_fit(module: nn.Module, layer: PackedLayer, name: str) -> None:
    if not packs(module):
        raise CheckpointError(
            f"The checkpoint packs {name}, but in this model that is a "
            f"{type(module).__name__}, which has no packed form. Next "
            "step: load it with the Auto class that its manifest names."
        )
    shape = weight_shape(module)
    if shape != layer.shape:
        raise CheckpointError(
            f"The checkpoint says that {name} has a weight of shape {layer.shape}, but config.json "
            f"makes it {shape}. Next step: restore config.json, or export again."
        )


def _forget_ties(model: nn.Module, swapped: set[str]) -> None:
    """Take the swapped weights out of what transformers ties on load and drops on save."""
    weights = {f"{name}.weight" for name in swapped}
    for prefix, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        inside = {w.removeprefix(f"{prefix}.") if prefix else w for w in weights}
        part.all_tied_weights_keys = _without(part.all_tied_weights_keys, inside)
        expanded = part.get_expanded_tied_weights_keys(all_submodels=False)
        if expanded:
            part._tied_weights_keys = _without(expanded, inside) or None


def _without(ties: Mapping[str, Any], weights: set[str]) -> dict[str, Any]:
    return {
        target: source
        for target, source in ties.items()
        if target not in weights and source not in weights
    }
