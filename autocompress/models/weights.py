"""Weights as matrices, and trials that leave no trace on them.

A trial swaps pointers: inside `overridden` a layer's module holds another tensor; the base tensor
is neither copied nor written and is put back whatever happens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn

from autocompress.core import LayerSpec
from autocompress.core.errors import AutocompressError, ModelError
from autocompress.models.layout import ModelLayout


@dataclass(frozen=True, slots=True)
class TensorVersion:
    """Identity of a resident tensor: the object, its memory and torch's count of writes to it."""

    object_id: int
    data_pointer: int
    writes: int


def sharing_copy(module: nn.Module) -> nn.Module:
    """A model of its own that shares every tensor: exchanging them leaves no trace on `module`."""
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)


def weight_matrix(module: nn.Module, layer: LayerSpec) -> Tensor:
    """The layer's weight as an (out_features, in_features) matrix: a detached view, never a copy.

    The view shares memory with the model; do not write to it.
    """
    return to_module_orientation(_weight(module, layer.name).detach(), layer)


def to_module_orientation(weight: Tensor, layer: LayerSpec) -> Tensor:
    """Turn an (out, in) matrix the way the module stores it, or back: the turn is its own inverse.

    Only a ``conv1d`` stores its weight as (in, out). Returns a view.
    """
    return weight.t() if layer.kind == "conv1d" else weight


@contextmanager
def overridden(
    module: nn.Module,
    layout: ModelLayout,
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> Iterator[nn.Module]:
    """Within the block, the named layers of `module` compute with other weights, or other inputs.

    The modules that share a layer's tensor (a tied head, the embeddings of encoder and decoder)
    change with it. Blocks may be nested; every exit, also by an exception, restores the very
    parameters that were there before.

    Args:
        module: the model; its parameters are exchanged, never written.
        layout: of the model.
        weights: by layer name, matrices of shape (out_features, in_features) in the dtype and on
            the device of the weight that they replace.
        inputs: by layer name, what becomes of the inputs (..., in_features) before the layer
            computes with them.

    Yields:
        The same module.

    Raises:
        ModelError: a name, shape, dtype or device does not fit. Nothing was changed then.
    """
    swaps = [
        (module.get_submodule(holder), parameter)
        for name, weight in weights.items()
        for holder, parameter in _replacements(module, layout.layer(name), weight)
    ]
    before = [(holder, cast(nn.Parameter, holder.weight)) for holder, _ in swaps]
    hooks = []
    try:
        for name, mapped in inputs.items():
            for holder_name in (name, *layout.layer(name).aliases):
                holder = module.get_submodule(holder_name)
                hooks.append(holder.register_forward_pre_hook(_reading(mapped)))
        for holder, parameter in swaps:
            holder.weight = parameter
        yield module
    finally:
        for hook in hooks:
            hook.remove()
        for holder, parameter in before:
            holder.weight = parameter


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter takes part in the graph within the block."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _reading(mapped: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Any, ...]]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (mapped(arguments[0]), *arguments[1:])

    return hook


def version_counters(module: nn.Module) -> dict[str, TensorVersion]:
    """Record which tensors a model holds and how often torch has written to each.

    Costs microseconds per tensor and reads no weights. It cannot see writes that bypass torch
    (through numpy, or by another process that maps the same memory).
    """
    return {
        name: TensorVersion(id(tensor), tensor.data_ptr(), tensor._version)
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def assert_untouched(module: nn.Module, before: Mapping[str, TensorVersion]) -> None:
    """Check that the model holds the tensors of `before`, none written since.

    Raises:
        ResidentWeightsError: names the tensors that were exchanged or written in place.
    """
    now = version_counters(module)
    changed = sorted(
        name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
    )
    if changed:
        raise ResidentWeightsError(
            "A trial must leave the base model as it found it, but these tensors were exchanged or "
            f"written in place: {', '.join(changed[:5])}"
            f"{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}. "
            "Work on a copy, or pass the new weight to `overridden`."
        )


class ResidentWeightsError(AutocompressError, RuntimeError):
    """Something wrote to the weights that all trials share."""

    exit_status = 1


def _weight(module: nn.Module, name: str) -> Tensor:
    return cast(Tensor, module.get_submodule(name).weight)


def _replacements(
    module: nn.Module, layer: LayerSpec, weight: Tensor
) -> Iterator[tuple[str, nn.Parameter]]:
    current = weight_matrix(module, layer)
    for what, got, expected in (
        ("shape", tuple(weight.shape), tuple(current.shape)),
        ("dtype", weight.dtype, current.dtype),
        ("device", weight.device, current.device),
    ):
        if got != expected:
            raise ModelError(
                f"The {what} of a replacement weight must be that of the layer: {layer.name!r} has "
                f"{expected}, but got {got}."
            )
    # A view: the caller's tensor is not copied. Linear kernels read either orientation.
    parameter = nn.Parameter(to_module_orientation(weight.detach(), layer), requires_grad=False)
    for holder in (layer.name, *layer.aliases):
        yield holder, parameter
