"""One rotation of the whole model, fused into its weights: outliers spread, nothing runs slower.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456, section 3) and SpinQuant (Liu et al. 2024, arXiv
2405.16406): an RMSNorm without gain commutes with an orthogonal Q. Once the gain g of each norm is
folded into the layers that read it, with the stream as rows x::

    E <- E Q        W_in <- W_in diag(g) Q        W_out <- Q^T W_out        b_out <- b_out Q

leave the function unchanged; so does an R per head between values and outputs,
``W_v <- R^T W_v``, ``W_o <- W_o R``. A LayerNorm commutes with every Q that keeps the vector of
ones, which Q = T (I - 2 w w^T) does: the reflection takes 1 T back to 1.

Q is the randomized Hadamard rotation of `autocompress.methods.hadamard`, of any width, and follows
from the seed. Products are in float64 and rounded once. No embedding mean is subtracted: that would
change an RMSNorm model. A tied head is untied, since only the head takes over the last norm's gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from autocompress.core import LayerSpec, derived_seed
from autocompress.core.errors import ModelError
from autocompress.methods.hadamard import rotated
from autocompress.models.layout import ModelLayout, describe
from autocompress.models.loading import BaseModel, model_digest
from autocompress.models.residual_stream import (
    NEXT_STEP,
    ResidualStream,
    StreamNorm,
    find_residual_stream,
    probe_inputs,
    refusal,
)
from autocompress.models.weights import sharing_copy, to_module_orientation, weight_matrix

_CHUNK_ELEMENTS = 1 << 24  # of float64 at a time
_LARGEST_ERROR = {torch.float32: 1e-3, torch.float64: 1e-6}
_LARGEST_ERROR_IN_16_BITS = 0.3  # every weight is rounded once more; a wrong fold gives about 1

Side = Callable[[Tensor], Tensor]
"""Rotates rows of float64 vectors (n, width)."""


def rotated_base(base: BaseModel, *, seed: int = 0) -> BaseModel:
    """The same function with the residual stream, and values head by head, in a rotated basis.

    The rotated model has a layout of its own: a head that was tied is a layer, and its bytes count.

    Args:
        base: it is not written.
        seed: of the rotation.

    Raises:
        ModelError: the architecture does not commute with a rotation: the rule, what breaks it and
            what to do instead.
    """
    stream = find_residual_stream(base.module)
    wanted = _logits(base.module)
    module, error = base.module, math.inf
    for heads in (stream.heads, ()):  # attention may do more with values than it shows
        module = _rotated(base.module, replace(stream, heads=heads), seed)
        error = _relative_error(_logits(module), wanted)
        if error <= _LARGEST_ERROR.get(wanted.dtype, _LARGEST_ERROR_IN_16_BITS):
            return replace(
                base, module=module, layout=describe(module), digest=model_digest(module)
            )
    raise ModelError(
        f"A rotated model must compute what the given one computes, but the logits of "
        f"{type(base.module).__name__} change by {error:.1%}: its residual stream is used in a way "
        f"that does not commute with a rotation. {NEXT_STEP}"
    )


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose parameters are cast to `dtype`; buffers (rotary frequencies) keep theirs.

    Parameters of another dtype than the first one's were kept apart on purpose and stay.
    """
    copied = sharing_copy(module)
    own = next(copied.parameters()).dtype
    made: dict[int, nn.Parameter] = {}
    for child in copied.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.dtype == own:
                new = made.setdefault(id(parameter), _parameter(parameter.detach().to(dtype)))
                setattr(child, name, new)
    return copied


@dataclass(frozen=True, slots=True)
class _Basis:
    """Q for rows of the stream; `keeps_mean` makes it leave the vector of ones where it is."""

    width: int
    seed: int
    keeps_mean: bool

    def __call__(self, rows: Tensor) -> Tensor:
        turned = rotated(rows, self.seed)
        if not self.keeps_mean:
            return turned
        ones = rows.new_full((1, self.width), 1 / math.sqrt(self.width))
        mirror = rotated(ones, self.seed) - ones
        square = mirror.square().sum()
        return turned - (turned @ mirror.T) * (2 / square) @ mirror if square > 0 else turned


@dataclass(slots=True)
class _Turns:
    """What happens to each layer, collected first so that every weight is rounded once."""

    rows: dict[str, Side] = field(default_factory=dict)
    columns: dict[str, Side] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, module: nn.Module, layout: ModelLayout) -> None:
        for name in {**self.columns, **self.rows}:
            layer = layout.layer(name)
            if layer.aliases:
                raise refusal(
                    "layers with weights of their own",
                    f"{', '.join((name, *layer.aliases))} share one matrix",
                )
            self._turn(module, layer)

    def _turn(self, module: nn.Module, layer: LayerSpec) -> None:
        holder = module.get_submodule(layer.name)
        weight = weight_matrix(module, layer)
        columns, rows = self.columns.get(layer.name), self.rows.get(layer.name)
        bias = getattr(holder, "bias", None)
        if bias is not None:
            moved = bias.detach().double() + self.shifts.get(layer.name, 0.0)
            moved = moved if rows is None else rows(moved[None])[0]
            holder.bias = _parameter(moved.to(bias.dtype))
        if rows is None:
            turned = _by_chunks(weight, columns or _as_it_is)
        else:
            inner = weight.double() if columns is None else columns(weight.double())
            turned = rows(inner.T).T.to(weight.dtype)
        holder.weight = _parameter(to_module_orientation(turned, layer).contiguous())


def _rotated(module: nn.Module, stream: ResidualStream, seed: int) -> nn.Module:
    """A copy of the model in the rotated basis."""
    copied = _untied(sharing_copy(module))
    layout = describe(copied)
    basis = _Basis(stream.width, derived_seed("rotation", "stream", seed), stream.centred)
    turns = _Turns(rows=dict.fromkeys(stream.writers, basis))
    for norm in stream.norms:
        _fold(copied, layout, norm, basis, turns)
    for pair in stream.heads:
        within = partial(
            _head_by_head, width=pair.width, seed=derived_seed("rotation", "head", seed)
        )
        turns.rows[pair.value], turns.columns[pair.output] = within, within
    turns.apply(copied, layout)
    for name in stream.embeddings:
        embedding = cast(nn.Embedding, copied.get_submodule(name))
        embedding.weight = _parameter(_by_chunks(embedding.weight.detach(), basis))
    return copied


def _untied(module: nn.Module) -> nn.Module:
    """The module with a head of its own, in its config too; it still shares memory."""
    model = cast(Any, module)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = _parameter(embedding.weight.detach())
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return module


def _fold(
    module: nn.Module, layout: ModelLayout, norm: StreamNorm, basis: _Basis, turns: _Turns
) -> None:
    """Give the readers of a norm its gain and, where they have one too, its bias."""
    holder = cast(Any, module.get_submodule(norm.name))
    gain = holder.weight.detach().double() + norm.offset
    for reader in norm.readers:
        turns.columns[reader] = partial(_scaled_then, gain=gain, side=basis)
    bias = getattr(holder, "bias", None)
    if bias is not None and bool(bias.any()):
        shift = bias.detach().double()
        readers = [layout.layer(name) for name in norm.readers]
        if all(module.get_submodule(r.name).bias is not None for r in readers):
            for layer in readers:
                turns.shifts[layer.name] = _product(weight_matrix(module, layer), shift)
            left = torch.zeros_like(shift)
        else:
            left = basis(_divided(norm.name, shift, gain)[None])[0]
        holder.bias = _parameter(left.to(bias.dtype))
    holder.weight = _parameter(torch.full_like(holder.weight, 1 - norm.offset))


def _divided(name: str, bias: Tensor, gain: Tensor) -> Tensor:
    """What the bias is before the gain, where no reader can take it over."""
    if bool(((gain == 0) & (bias != 0)).any()):
        raise refusal(
            "a bias after every norm, or no zero among its gains",
            f"{name} has a bias, zero gains, and feeds layers without bias",
        )
    return torch.where(bias == 0, 0.0, bias / gain)


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.cat([part.double() @ vector for part in _chunks(matrix)])


def _by_chunks(matrix: Tensor, side: Side) -> Tensor:
    """`side` of the rows in float64, rounded to the dtype of the matrix; bounded memory."""
    return torch.cat([side(part.double()).to(matrix.dtype) for part in _chunks(matrix)])


def _chunks(matrix: Tensor) -> tuple[Tensor, ...]:
    return torch.split(matrix, max(1, _CHUNK_ELEMENTS // matrix.shape[1]))


def _scaled_then(rows: Tensor, gain: Tensor, side: Side) -> Tensor:
    return side(rows * gain)


def _head_by_head(rows: Tensor, width: int, seed: int) -> Tensor:
    return rotated(rows.reshape(-1, width), seed).view_as(rows)


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        answer = module(**probe_inputs(module))
    logits = getattr(answer, "logits", None)
    if not isinstance(logits, Tensor):
        raise refusal("a model with logits", f"{type(module).__name__} gives none")
    return logits


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    spread = (wanted - wanted.mean(-1, keepdim=True)).norm()
    return float((found.double() - wanted).norm() / spread.clamp_min(1e-300))
