"""Mixture-of-experts layers: every expert a layer of its own.

Transformers keeps the experts of a block in stacked parameters, (experts, out, in). Here each slice
becomes the weight of a linear module, a view that shares memory with the stack, so that whatever
works on layers (statistics, curvature, pointer swaps, packing) works on one expert, and an expert's
hooks see the tokens that were routed to it and no others. The slice ``e`` of the parameter
``mlp.experts.down_proj`` is the layer ``mlp.experts.down_proj.<e>``.

`stack_experts` is the inverse, for checkpoints that stock transformers loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autocompress.core.layer import ExpertOf

# What routers, blocks and configs call the number of experts that a token is sent to.
_PER_TOKEN = (
    "top_k", "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Routed:
    """The tokens that an expert computes with.

    Attributes:
        tokens: (n,) their places among all tokens of the batch, ascending.
        n_tokens: number of all tokens of the batch, padding included.
    """

    tokens: Tensor
    n_tokens: int

    def counting(self, mask: Tensor | None) -> Tensor | None:
        """(n,) True for those that are no padding; None if all count.

        A mask (sequences, tokens) of another size does not speak about these tokens.
        """
        if mask is None or mask.numel() != self.n_tokens:
            return None
        return mask.reshape(-1).to(self.tokens.device)[self.tokens]

    def sequences(self, n_sequences: int) -> Tensor | None:
        """(n,) the number of each token's sequence; None if they are not equally long."""
        if n_sequences == 0 or self.n_tokens % n_sequences:
            return None
        return self.tokens // (self.n_tokens // n_sequences)


class SeparateExperts(nn.Module):
    """Experts whose weights are modules of their own; made by `separate_experts` only.

    Computes what the stock module computes expert by expert, in the same order.

    Args:
        stacked: the stock module; its stacked parameters are taken out of it.
        per_token: number of experts that a token is sent to.
    """

    def __init__(self, stacked: nn.Module, per_token: int) -> None:
        super().__init__()
        rule = cast(Any, stacked)
        self.up_name = "gate_up_proj" if rule.has_gate else "up_proj"
        self.per_token = per_token
        self.routed: Routed | None = None
        for name in (self.up_name, "down_proj"):
            weights = cast(nn.Parameter, stacked._parameters.pop(name))
            biases = stacked._parameters.pop(f"{name}_bias", None)
            self.n_experts = len(weights)
            self.add_module(name, nn.ModuleList(_linears(weights, biases, rule.is_transposed)))
        # In a tuple that hides it from the module registry: it has no tensors left.
        self._rule = (stacked,)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, width) and the (tokens, k) experts and weights of each to (tokens, width)."""
        result = torch.zeros_like(hidden_states)
        n_tokens, k = top_k_index.shape
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        shares = top_k_weights.reshape(-1)
        # An index beyond the last expert is none.
        counts = torch.bincount(experts, minlength=self.n_experts).tolist()[: self.n_experts]
        for expert, places in enumerate(torch.split(order[: sum(counts)], counts)):
            if len(places):
                tokens = places // k
                self.routed = Routed(tokens, n_tokens)
                computed = self._expert(expert, hidden_states[tokens]) * shares[places, None]
                result.index_add_(0, tokens, computed.to(result.dtype))
        self.routed = None
        return result

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        rule = cast(Any, self._rule[0])
        inner = self.projection(self.up_name)[expert](rows)
        inner = rule._apply_gate(inner) if rule.has_gate else rule.act_fn(inner)
        return cast(Tensor, self.projection("down_proj")[expert](inner))

    def projection(self, name: str) -> nn.ModuleList:
        """The linear modules of a stacked parameter, one for each expert."""
        return cast(nn.ModuleList, self.get_submodule(name))

    def stacked(self) -> nn.Module:
        """The stock module with the weights that these modules hold now, stacked again."""
        rule = self._rule[0]
        for name in (self.up_name, "down_proj"):
            layers = [cast(Any, layer) for layer in self.projection(name)]
            rule.register_parameter(name, _stack([layer.weight for layer in layers]))
            if layers[0].bias is not None:
                rule.register_parameter(f"{name}_bias", _stack([layer.bias for layer in layers]))
        return rule


def separate_experts(model: nn.Module) -> nn.Module:
    """Make every expert of stacked parameters a layer of its own, in place; returns `model`.

    Weights are shared, not copied. Experts that compute in a way of their own (their class does
    not say that it follows the common interface of transformers, or they have a norm of their
    own) stay stacked: they are no layers.
    """
    for name, child in list(model.named_modules()):
        if name and _is_stacked(child):
            parent = model.get_submodule(name.rpartition(".")[0])
            per_token = _per_token(parent, child)
            model.set_submodule(name, SeparateExperts(child, per_token))
    return model


def stack_experts(model: nn.Module) -> nn.Module:
    """The inverse of `separate_experts`, in place; returns `model`. Weights are copied."""
    for name, child in list(model.named_modules()):
        if isinstance(child, SeparateExperts):
            model.set_submodule(name, child.stacked())
    return model


def has_experts(model: nn.Module) -> bool:
    """True if `separate_experts` found something in `model`."""
    return any(isinstance(child, SeparateExperts) for child in model.modules())


def expert_of(model: nn.Module, layer: str) -> ExpertOf | None:
    """Which expert the layer called `layer` is a part of; None if of none."""
    holder, expert = _holder(model, layer)
    return None if holder is None else ExpertOf(int(expert), holder.n_experts, holder.per_token)


def routed_to(model: nn.Module, layer: str) -> Routed | None:
    """The tokens that a layer of an expert is computing with now; None for any other layer."""
    return getattr(_holder(model, layer)[0], "routed", None)


def _holder(model: nn.Module, layer: str) -> tuple[SeparateExperts | None, str]:
    parts = layer.rsplit(".", 2)
    holder = model.get_submodule(parts[0]) if len(parts) == 3 else None
    return (holder if isinstance(holder, SeparateExperts) else None), parts[-1]


def _is_stacked(module: nn.Module) -> bool:
    """Follows the interface that transformers' `use_experts_implementation` promises."""
    if isinstance(module, SeparateExperts) or not hasattr(module, "_apply_gate"):
        return False
    rule = cast(Any, module)
    expected = {"gate_up_proj" if rule.has_gate else "up_proj", "down_proj"}
    if rule.has_bias:
        expected |= {f"{name}_bias" for name in expected}
    # A transposed weight is a Conv1D, which always has a bias.
    return set(module.state_dict()) == expected and rule.has_bias >= rule.is_transposed


def _per_token(parent: nn.Module, experts: nn.Module) -> int:
    """Experts per token, as block, router or config say; all of them if none does."""
    config = getattr(experts, "config", None)
    for holder in (parent, *parent.children(), config, getattr(config, "text_config", None)):
        for name in _PER_TOKEN:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return len(next(p for p in experts.parameters(recurse=False) if p.ndim == 3))


def _linears(
    weights: nn.Parameter, biases: nn.Parameter | None, transposed: bool
) -> Iterator[nn.Module]:
    for expert in range(len(weights)):
        rows, columns = weights.shape[1:]
        module: nn.Module
        if transposed:
            with torch.device("meta"):
                module = Conv1D(columns, rows)
        else:
            module = nn.Linear(columns, rows, bias=biases is not None, device="meta")
        cast(Any, module).weight = _slice(weights, expert)
        if biases is not None:
            cast(Any, module).bias = _slice(biases, expert)
        yield module


def _slice(stacked: nn.Parameter, expert: int) -> nn.Parameter:
    return nn.Parameter(stacked.detach()[expert], requires_grad=stacked.requires_grad)


def _stack(parameters: list[nn.Parameter]) -> nn.Parameter:
    stacked = torch.stack([parameter.detach() for parameter in parameters])
    return nn.Parameter(stacked, requires_grad=parameters[0].requires_grad)
