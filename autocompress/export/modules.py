"""Modules that hold a packed weight and decode it when they compute.

A packed module is the base module itself with its class extended and its `weight` replaced by the
stored tensors as buffers: bias, padding index, embedding scale and whatever else the architecture
keeps stay where they were, and its own `forward` runs. One layer is decoded at a time and dropped
after use, so resident memory is the packed bytes plus the largest layer.

A factorized layer is decoded to its dense matrix as well: a reload then computes with the very
matrix that the search measured, to the last bit. (Rows that an embedding looks
up are multiplied alone, and may differ from that matrix in rounding.) Multiplying by the two thin
factors instead would be cheaper and differ everywhere in rounding.

That is the reference. `use_kernels` lets linear layers run on the fastest kernel instead, within
its rounding (`autocompress.kernels`); gradients and computing with the weight itself still decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from autocompress.core import TensorLayout
from autocompress.export.deferred import DeferredWeight
from autocompress.export.plan import PackedLayer
from autocompress.kernels import REFERENCE, Runner, require_choice
from autocompress.methods import (
    Damage,
    damage_of,
    decode,
    decode_rows,
    drops,
    input_map,
    is_shared,
    shares,
)


class StoredTensors(nn.Module):
    """A module some of whose buffers are stored tensors: they move between devices, but keep dtype.

    ``model.to(torch.bfloat16)`` changes what the model computes in; rounding the float16 scales
    to it would change the weights.
    """

    _stored: tuple[str, ...] = ()

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Register tensors as buffers."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._stored = tuple(tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredTensors:
        kept = {name: self._buffers.pop(name) for name in self._stored}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's is untyped
        finally:
            self._buffers.update(kept)
        for name, tensor in kept.items():
            if tensor is not None:
                self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return self


class PackedModule(StoredTensors):
    """What the packed layers share. Made by `pack_module` only."""

    packed_layer: PackedLayer
    _names: tuple[str, ...]
    # The module that holds the tensors, in a tuple that hides it from the module registry: a tied
    # head must not show up with tensors of its own.
    _owner: tuple[PackedModule, ...]
    # The module that stores what this one's layer shares with it, hidden likewise.
    _lender: tuple[PackedModule, ...] = ()
    # Empty buffer whose dtype and device are those that the layer computes in.
    compute: Tensor
    # What the scheme says of every call, asked once.
    _drops: bool
    _shares: bool
    kernels: str = REFERENCE
    _runner: Runner | None = None
    _ran_on: tuple[object, ...] = ()

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name within the layer; those of the owner if this is an alias."""
        if self._owner:
            return self._owner[0].stored()
        tensors = {name: self._buffer(name) for name in self._names}
        for lender in self._lender:
            shared = lender.stored().items()
            borrowed = {n: t for n, t in shared if is_shared(n, self.packed_layer.scheme)}
            tensors |= {n: t.to(self.compute.device) for n, t in borrowed.items()}
        return tensors

    def _buffer(self, name: str) -> Tensor:
        """As `get_buffer`, which takes many times as long for a buffer of the module itself."""
        found = self._buffers.get(name)
        return self.get_buffer(name) if found is None else found

    def damage(self) -> Damage | None:
        """What is wrong with the tensors that this module itself holds; None if nothing is."""
        own = {name: self.get_buffer(name) for name in self._names}
        if any(tensor.is_meta for tensor in own.values()):
            return None
        return damage_of(own, self.packed_layer.scheme, self.packed_layer.shape)

    def matrix(self) -> Tensor:
        """Decode the (out_features, in_features) matrix in the compute dtype."""
        layer = self.packed_layer
        with torch.no_grad():
            matrix = decode(self.stored(), layer.scheme, layer.shape, self.compute.dtype)
        return matrix.to(self.compute.device)  # where nothing is stored it says no device

    def decoded_weight(self) -> Tensor:
        """Decode the weight as the base module stores it."""
        return self.matrix()

    def read(self, inputs: Tensor) -> Tensor:
        """Inputs as the layer's scheme rounds them; themselves if it does not."""
        mapped = input_map(self.stored(), self.packed_layer.scheme)
        return inputs if mapped is None else mapped(inputs)

    def product(self, inputs: Tensor) -> Tensor | None:
        """``x Wᵀ`` of inputs (..., in) by a kernel; None if the reference must compute it.

        Nothing is multiplied where nothing is left of the layer. Kernels have no gradients, and
        nothing to gain on no tokens; they are measured on layers by themselves, so those that
        share are decoded.
        """
        if torch.is_grad_enabled() and inputs.requires_grad:
            return None
        o, d = self.packed_layer.shape
        if self._drops:
            return inputs.new_zeros(*inputs.shape[:-1], o)
        if self._shares or self.kernels == REFERENCE:
            return None
        if not inputs.numel() or inputs.is_meta:
            return None
        stored = self.stored()
        rows = self._runner_on(inputs.device, stored)(stored, inputs.reshape(-1, d))
        return rows.view(*inputs.shape[:-1], o)

    def _runner_on(self, device: torch.device, stored: Mapping[str, Tensor]) -> Runner:
        """What is prepared belongs to these very tensors: moved or rewritten ones start afresh."""
        dtype = self.compute.dtype
        on = (device, dtype, *map(_identity, stored.values()))
        if self._runner is None or self._ran_on != on:
            layer = self.packed_layer
            self._runner = Runner(layer.scheme, layer.shape, dtype, device, self.kernels)
            self._ran_on = on
        return self._runner

    @property
    def weight(self) -> DeferredWeight:
        """The weight as the base module stores it; decodes only when computed with."""
        shape = torch.Size(self.packed_layer.shape)
        return DeferredWeight.of(self.decoded_weight, self.oriented(shape), self.compute)

    @staticmethod
    def oriented(shape: torch.Size) -> torch.Size:
        """Shape of the module's weight for a matrix of `shape`."""
        return shape

    def extra_repr(self) -> str:
        """The base module's line and the scheme."""
        return f"{super().extra_repr()}, scheme={self.packed_layer.scheme}"


class PackedLinear(PackedModule, nn.Linear):  # type: ignore[misc]  # weight is a property here
    """A packed `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """``x Wᵀ + b``; (..., in) to (..., out)."""
        product = self.product(input)
        if product is not None:
            bias = cast("Tensor | None", self.bias)
            return product if bias is None else product + bias
        return functional.linear(self.read(input), self.decoded_weight(), self.bias)


class PackedConv1D(PackedModule, Conv1D):  # type: ignore[misc]  # transformers is untyped
    """A packed `Conv1D` of GPT-2, whose weight is (in, out); its own forward runs."""

    def forward(self, x: Tensor) -> Tensor:
        """``x W + b``; (..., in) to (..., out)."""
        product = self.product(x)
        if product is not None:
            return product + cast(Tensor, self.bias)
        computed: Tensor = super().forward(self.read(x))
        return computed

    def decoded_weight(self) -> Tensor:
        """Decode the (in, out) weight."""
        return self.matrix().t()

    @staticmethod
    def oriented(shape: torch.Size) -> torch.Size:
        """(in, out) for (out, in)."""
        return torch.Size(reversed(shape))


class PackedEmbedding(PackedModule, nn.Embedding):  # type: ignore[misc]  # as above
    """A packed `nn.Embedding`: decodes the rows that are looked up, each once."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) ids to (..., width)."""
        layer = self.packed_layer
        rows, position = torch.unique(input, return_inverse=True)
        if not rows.numel():
            return self.compute.new_empty(*input.shape, layer.shape[1])
        if not 0 <= int(rows[0]) <= int(rows[-1]) < layer.shape[0]:
            raise IndexError(f"Token ids must be in 0..{layer.shape[0] - 1}.")
        with torch.no_grad():
            table = decode_rows(self.stored(), layer.scheme, layer.shape, rows, self.compute.dtype)
        return table.to(position.device)[position]


_PACKED: Mapping[type[nn.Module], type[PackedModule]] = {
    nn.Linear: PackedLinear,
    Conv1D: PackedConv1D,
    nn.Embedding: PackedEmbedding,
}


def packs(module: nn.Module) -> bool:
    """True if `pack_module` knows this kind of module."""
    return _packed_base(type(module)) is not None and not isinstance(module, PackedModule)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """(out_features, in_features) of a module that `packs` accepts."""
    shape = cast(Tensor, module.weight).shape
    packed = _packed_base(type(module))
    return tuple(shape if packed is None else packed.oriented(shape))


def pack_module(
    module: nn.Module,
    layer: PackedLayer,
    tensors: Mapping[str, Tensor],
    compute_dtype: torch.dtype,
    owner: PackedModule | None = None,
) -> PackedModule:
    """Turn a module that `packs` accepts into its packed form, in place.

    Args:
        module: loses its `weight` parameter; keeps everything else.
        layer: scheme and shape.
        tensors: stored tensors by name within the layer (``packed``, ``a.scales``); may be on the
            meta device. Ignored if there is an `owner`.
        compute_dtype: what the weight decodes to.
        owner: the module that holds the tensors if this one is an alias of it.
    """
    device = cast(Tensor, module.weight).device
    del module._parameters["weight"]
    module.__class__ = _packed_class(type(module))  # type: ignore[arg-type]  # classes are hashable
    packed = cast(PackedModule, module)
    packed.packed_layer = layer
    packed._drops, packed._shares = drops(layer.scheme), shares(layer.scheme)
    packed._owner = () if owner is None else (owner,)
    packed._names = tuple(tensors) if owner is None else ()
    packed.register_buffer(
        "compute", torch.empty(0, dtype=compute_dtype, device=device), persistent=False
    )
    if owner is None:
        _hold(packed, tensors)
    return packed


def use_kernels(model: nn.Module, kernels: str) -> None:
    """Let the packed layers of `model` run on `kernels`: ``auto``, ``reference`` or ``dense``.

    Raises:
        UsageError: no such choice.
    """
    require_choice(kernels)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.kernels = kernels
            module._runner = None


def borrow(module: PackedModule, lender: PackedModule) -> None:
    """Let a module decode with what `lender` stores for the layers that share with it."""
    module._lender = (lender,)


def empty_tensors(layouts: Mapping[str, TensorLayout], device: torch.device) -> dict[str, Tensor]:
    """Uninitialised tensors of the given shapes and dtypes."""
    return {
        name: torch.empty(layout.shape, dtype=getattr(torch, layout.dtype), device=device)
        for name, layout in layouts.items()
    }


def _hold(module: StoredTensors, tensors: Mapping[str, Tensor]) -> None:
    """Register ``packed`` on the module itself, ``a.packed`` on a child called ``a``."""
    children: dict[str, dict[str, Tensor]] = {}
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        child, dot, rest = name.partition(".")
        if dot:
            children.setdefault(child, {})[rest] = tensor
        else:
            own[name] = tensor
    module.hold(own)
    for child, held in children.items():
        holder = StoredTensors()
        _hold(holder, held)
        module.add_module(child, holder)


def restore_stored_dtypes(model: nn.Module) -> None:
    """Give stored tensors back the dtype of the file, where a loader cast them to a wider one."""
    for module in model.modules():
        if isinstance(module, PackedModule) and not module._owner:
            for name, layout in module.packed_layer.tensors().items():
                holder, _, leaf = name.rpartition(".")
                buffers = module.get_submodule(holder)._buffers
                tensor = buffers[leaf]
                assert tensor is not None
                buffers[leaf] = tensor.to(getattr(torch, layout.dtype))


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor is moved, replaced or written."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _packed_base(cls: type[nn.Module]) -> type[PackedModule] | None:
    """The packed class of what `cls` is or derives from."""
    return next((packed for base, packed in _PACKED.items() if issubclass(cls, base)), None)


@lru_cache(maxsize=256)
def _packed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with its weight packed.

    A subclass (a scaled word embedding) comes first in the resolution order: its own `forward`
    runs, and where it calls its parent's it reaches the packed one.
    """
    packed = _packed_base(cls)
    assert packed is not None
    if cls in _PACKED:
        return packed
    return type(f"Packed{cls.__name__}", (cls, packed), {"__module__": __name__})
