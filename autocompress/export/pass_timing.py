"""Seconds of each layer inside a forward of a whole model, as a loaded checkpoint would run it.

Timed alone, a layer finds caches as no model leaves them: its inputs are cold or its weights warm.
So whole models run, packed and on the fastest kernels, and each layer is timed in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from autocompress.core import Allocation, LayerSpec, Scheme
from autocompress.core.errors import ModelError
from autocompress.export.modules import use_kernels
from autocompress.export.pass_inputs import pass_inputs
from autocompress.export.plan import PackedLayer, PackedPlan
from autocompress.export.swapping import swap_modules
from autocompress.export.writing import shallow_copy
from autocompress.kernels import AUTO, signature
from autocompress.kernels.measure import random_tensors
from autocompress.methods import footprint
from autocompress.models import BaseModel

_WARM_UP = 2  # the first chooses kernels and lets them repack

Mark = float | torch.cuda.Event


class Stored:
    """Random stored tensors, made once for layers of equal shape and coding, then copied."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], dict[str, Tensor]] = {}

    def of(self, layer: LayerSpec, scheme: Scheme) -> dict[str, Tensor]:
        """Tensors of a layer's own: sharing them would keep them in caches."""
        own = footprint(layer, scheme).tensors
        shape = (layer.out_features, layer.in_features)
        key = (shape, layer.dtype, signature(shape, scheme), *own)
        if key not in self._made:
            self._made[key] = random_tensors(layer, scheme)
        return {name: t.clone() for name, t in self._made[key].items()}


def packed_model(base: BaseModel, allocation: Allocation, stored: Stored) -> PreTrainedModel:
    """The model of an allocation with random codes, as ``load(..., kernels="auto")`` gives it.

    Shares all that is not compressed with `base`, which is not changed.

    Raises:
        ModelError: it cannot be exported.
    """
    model = shallow_copy(base.module)
    device = next(base.module.parameters()).device
    layers = {name: base.layout.layer(name) for name, s in allocation.items() if not s.is_base}
    plan = PackedPlan(
        str(model.dtype).removeprefix("torch."),
        tuple(PackedLayer.of(layer, allocation[name]) for name, layer in layers.items()),
    )
    tensors = {
        name: {leaf: t.to(device) for leaf, t in stored.of(layer, allocation[name]).items()}
        for name, layer in layers.items()
    }
    swap_modules(model, plan, model.dtype, tensors)
    use_kernels(model, AUTO)
    return model.eval()


@dataclass(frozen=True, eq=False)
class TimedModel:
    """A model that runs passes over a fixed number of random tokens, one sequence at a time.

    Attributes:
        model: it runs.
        n_tokens: of a pass.
        inputs: fresh keyword arguments of a pass; one token is decoded after `CONTEXT_TOKENS`
            others where the model has a cache.
    """

    model: PreTrainedModel
    n_tokens: int
    inputs: Callable[[], dict[str, Any]]

    @classmethod
    def of(cls, model: PreTrainedModel, auto_class: str, n_tokens: int) -> TimedModel:
        """A model that was loaded with `auto_class`.

        Raises:
            ModelError: it cannot read `n_tokens`.
        """
        try:
            return cls(model, n_tokens, pass_inputs(model, auto_class, n_tokens))
        except (RuntimeError, IndexError, ValueError) as error:
            raise _too_long(n_tokens, error) from error

    def seconds(self) -> float:
        """One pass."""
        arguments, device = self.inputs(), self.model.device
        with torch.no_grad():
            start = _mark(device)
            self.model(**arguments)
            end = _mark(device)
        return _elapsed(start, end, device)

    def warm_up(self) -> None:
        """Let kernels be chosen, and whatever else happens only once.

        Raises:
            ModelError: the model cannot read so many tokens.
        """
        try:
            for _ in range(_WARM_UP):
                self.seconds()
        except (RuntimeError, IndexError, ValueError) as error:
            raise _too_long(self.n_tokens, error) from error

    def parts(self, layers: Mapping[str, LayerSpec]) -> tuple[float, dict[str, float]]:
        """Seconds of one pass, and of each layer in it: all modules that compute with its weight.

        A layer that did not run takes none.
        """
        spent: dict[str, list[tuple[Mark, Mark]]] = {name: [] for name in layers}
        device = self.model.device
        patched = [
            (self.model.get_submodule(holder), spent[name])
            for name, layer in layers.items()
            for holder in (name, *layer.aliases)
        ]
        for module, found in patched:
            module.forward = partial(_timed, module.forward, found, device)
        try:
            whole = self.seconds()
        finally:
            for module, _ in patched:
                del module.forward
        return whole, {
            name: sum(_elapsed(*pair, device) for pair in pairs) for name, pairs in spent.items()
        }


def _timed(
    forward: Callable[..., object],
    found: list[tuple[Mark, Mark]],
    device: torch.device,
    /,
    *args: object,
    **kwargs: object,
) -> object:
    start = _mark(device)
    result = forward(*args, **kwargs)
    found.append((start, _mark(device)))
    return result


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
    event.record(torch.cuda.current_stream(device))
    return event


def _elapsed(start: Mark, end: Mark, device: torch.device) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    torch.cuda.synchronize(device)
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def _too_long(n_tokens: int, error: Exception) -> ModelError:
    return ModelError(
        f"A pass over {n_tokens} tokens cannot be timed: {str(error).splitlines()[0]}. Next step: "
        "give fewer --tokens."
    )
