"""Seconds of a layer from its shape and scheme alone: what a latency model sums over layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autocompress.core.errors import UsageError
from autocompress.core.footprint import TensorLayout
from autocompress.core.layer import LayerSpec
from autocompress.core.scheme import Scheme
from autocompress.kernels.dispatch import bucket, candidates, measured
from autocompress.methods.compress import compress, footprint
from autocompress.methods.packing import pack
from autocompress.methods.problem import LayerStatistics
from autocompress.methods.schemes import Plan, check, narrowed_layer, plan
from autocompress.methods.sparsity import keep_highest, keep_pattern
from autocompress.methods.storage import WIDTH
from autocompress.methods.subgroup import BandCoding


def measure(
    shape: tuple[int, int],
    scheme: Scheme,
    n_tokens: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """Seconds that a layer takes with ``kernels="auto"``, inputs and outputs on the device.

    The kernel is the one that a model would run `n_tokens` on: chosen at the nearest number of
    tokens below, of 1, 4, 16, 64 and 256. Taken from the device's table, or measured with random
    weights and added to it; a weight is read from memory, not from a cache.

    Raises:
        SchemeError: a layer of this shape cannot take `scheme`.
        UsageError: `n_tokens` is not positive.
    """
    chosen_at = times(shape, scheme, bucket(n_tokens), device, dtype)
    name = min(chosen_at, key=chosen_at.__getitem__)
    return times(shape, scheme, n_tokens, device, dtype)[name]


def times(
    shape: tuple[int, int],
    scheme: Scheme,
    n_tokens: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Mapping[str, float]:
    """Seconds of every kernel that such a layer may be given, by name; errors as `measure`."""
    if n_tokens < 1:
        raise UsageError(f"n_tokens must be at least 1, but got {n_tokens}.")
    place = torch.device(device)
    check(layer_of(shape, dtype), scheme)
    ready = plan(scheme)
    shape, scheme = ready.narrow(shape), ready.inside.scheme
    names = {kernel.name for kernel in candidates(shape, scheme, dtype, place)}
    layer = layer_of(shape, dtype)

    def tensors() -> dict[str, Tensor]:
        return {n: t.to(place) for n, t in random_tensors(layer, scheme).items()}

    found = measured(tensors, shape, scheme, dtype, place, n_tokens=n_tokens)
    return {name: seconds for name, seconds in found.items() if name in names}


def random_tensors(layer: LayerSpec, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors such as `layer` stores under `scheme`, with random codes: nothing is compressed.

    Except where what is stored must add up (sub-groups, residuals): those layers are compressed.
    """
    ready = plan(scheme)
    if ready.width is not None:
        options = ready.width.options
        kept = torch.arange(options.of) < options.keep
        inside = random_tensors(narrowed_layer(layer, ready), ready.inside.scheme)
        return {f"{WIDTH}kept": pack(kept.view(torch.uint8), 1), **inside}
    whole = (layer.out_features, layer.in_features)
    generator = torch.Generator().manual_seed(0)
    if ready.residual is not None or isinstance(ready.coding, BandCoding):
        weight = torch.randn(whole, generator=generator).to(getattr(torch, layer.dtype))
        return dict(compress(weight, scheme, LayerStatistics.none()).tensors)
    tensors = {
        name: _random(layout, generator)
        for name, layout in footprint(layer, scheme).tensors.items()
    }
    for prefix, shape in ready.matrices(whole).items():
        if f"{prefix}mask" in tensors:
            tensors[f"{prefix}mask"] = pack(_mask(ready, shape, generator).view(torch.uint8), 1)
    return tensors


def _random(layout: TensorLayout, generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, layout.dtype)
    if dtype.is_floating_point:
        return torch.full(layout.shape, 0.01).to(dtype)
    return torch.randint(0, 256, layout.shape, generator=generator, dtype=torch.uint8).to(dtype)


def _mask(ready: Plan, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A random mask (o, d) that the scheme's sparsifier might choose."""
    scores = torch.rand(shape, generator=generator)
    sparsify, n_kept = ready.sparsify, ready.storage(shape).n_kept
    assert sparsify is not None  # or nothing would be masked
    assert n_kept is not None
    pattern = getattr(sparsify.options, "kept_of", None)
    if pattern is not None:
        return keep_pattern(scores, pattern)
    return keep_highest(scores.view(1, -1), n_kept).view(shape)


def layer_of(shape: tuple[int, int], dtype: torch.dtype) -> LayerSpec:
    """A linear layer of `shape` (o, d) that is stored in `dtype`."""
    return LayerSpec(
        name="layers.0",  # of a block, so that it can take any scheme
        role="other",
        block=None,
        out_features=shape[0],
        in_features=shape[1],
        kind="linear",
        dtype=str(dtype).removeprefix("torch."),
        input_name=None,
        macs_per_token=shape[0] * shape[1],
    )
