"""What is done to the experts and routers of a trained mixture, one thing at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import BATCH, SPACE
from mixture_model import (
    LENGTH,
    N_EXPERTS,
    fewer_routed,
    rounded_routers,
    router_savings,
    write_held_out,
)

from autocompress.core import STORAGE, Allocation, LayerSpec, Scheme, TrialRequest, derived_seed
from autocompress.methods import canonical
from autocompress.models.curvature import predicted_damage
from autocompress.search import TrialContext
from autocompress.search.option_table import OptionTable
from autocompress.search.run_trial import run_trial
from autocompress.search.solver import solve_exactly
from autocompress.workflows.reach import routed_tokens
from autocompress.workflows.session import EXACT_DTYPE, Session, open_session
from autocompress.workflows.settings import SearchSettings

GROUP = 64
BITS = (2, 3, 4)
DROPPED = (1, 2, 4)
CHANCES = 5
TIERS = {"halves": (4, 2), "quarters": (4, 3, 3, 2)}
"""Bits of the first experts, the next and so on; 3 in the mean."""
Expert = tuple[int, int]
"""Block and number."""
Row = dict[str, Any]


def gptq(bits: int) -> str:
    """The scheme of a width."""
    return f"gptq(bits={bits},group_size={GROUP})"


def rtn(bits: int) -> str:
    """The same without error compensation."""
    return f"rtn(bits={bits},group_size={GROUP})"


HALF = "drop 4 least predicted anywhere, others gptq at 8 bits"


@dataclass(frozen=True)
class Arm:
    """One thing to measure.

    Attributes:
        name: of it.
        allocation: schemes of layers.
        routers: what is done to the routers meanwhile.
        saved: bytes that this saves.
    """

    name: str
    allocation: Allocation = field(default_factory=Allocation)
    routers: Callable[[], AbstractContextManager[None]] = nullcontext
    saved: int = 0


class Mixture:
    """The model, its tokens, and how much each expert is used.

    Attributes:
        layers: of each expert.
        sent: calibration tokens that reach each expert.
        used: experts of each block, those that most tokens are sent to first.
    """

    def __init__(self, folder: Path, tokens: int, seed: int) -> None:
        settings = SearchSettings(
            str(folder / "model"), data=str(write_held_out(folder / "held_out.jsonl")),
            space=str(SPACE.with_name("experts_alone.yaml")), dtype=EXACT_DTYPE, seed=seed,
            sequence_length=LENGTH, calibration_tokens=16384, search_tokens=tokens,
            report_tokens=256,
        )  # fmt: skip
        self.session: Session = open_session(settings, folder / "cache")
        self.module = self.session.compute_module(EXACT_DTYPE)
        self.layers: dict[Expert, list[LayerSpec]] = {}
        for layer in self.session.base.layout.layers:
            if layer.expert is not None and layer.block is not None:
                self.layers.setdefault((layer.block, layer.expert.index), []).append(layer)
        sent = routed_tokens(self.session)
        self.sent = {expert: sent[layers[0].name] for expert, layers in self.layers.items()}
        self.used = {
            block: sorted(range(N_EXPERTS), key=lambda e: -self.sent[block, e])
            for block in sorted({block for block, _ in self.layers})
        }
        split, bank = self.session.splits.search, self.session.bank(EXACT_DTYPE)
        self.context = TrialContext(
            self.module, self.session.base.layout, bank, self.session.task, split,
            self.session.reference(self.module, split, BATCH), self.session.cost, BATCH,
            prefix_bytes=0,  # routers change under it
        )  # fmt: skip
        self.table: OptionTable = self.session.option_table(bank, self.session.searched_curvature)

    def allocation(self, schemes: Mapping[Expert, str]) -> Allocation:
        """Schemes of all layers of experts."""
        return Allocation.of(
            {
                layer.name: Scheme.parse(text)
                for expert, text in schemes.items()
                for layer in self.layers[expert]
            }
        )

    def row(self, arm: Arm) -> Row:
        """What an arm damages."""
        allocation = arm.allocation
        with arm.routers():
            result = run_trial(TrialRequest(0, allocation, "benchmark"), context=self.context)
        assert result.metrics is not None, result.error
        quality, layout = result.metrics.quality, self.session.base.layout
        names = tuple(layer.name for layers in self.layers.values() for layer in layers)
        of_experts = replace(self.session.cost, searched_layers=names)
        return {
            "scheme": arm.name,
            "bits": round(of_experts.bits_per_weight(allocation), 4),
            "bytes_saved": layout.base_bytes
            - int(result.metrics.resources[STORAGE].value)
            + arm.saved,
            "damage": quality.damage.to_json(),
            "perplexity": quality.metrics["perplexity"].to_json(),
            "notes": list(result.notes),
            "damages": list(result.damages),
        }

    def predicted_to_drop(self, expert: Expert) -> float:
        """Predicted damage of dropping an expert, one that every token is sent to as well."""
        curvature, weights = self.session.searched_curvature, self.session.weights
        return sum(
            predicted_damage(weights[x.name], torch.zeros_like(weights[x.name]), curvature.get(x))
            for x in self.layers[expert]
        )

    def predicted(self, expert: Expert, text: str) -> float:
        """Predicted damage of a scheme on an expert; infinite if the space does not offer it."""
        names = {layer.name for layer in self.layers[expert]}
        scheme = canonical(Scheme.parse(text))
        for choice, damages in zip(self.session.space.choices, self.table.damage, strict=True):
            if names <= set(choice.layers):
                for option, damage in zip(choice.options, damages, strict=True):
                    if canonical(option.schemes[0]) == scheme:
                        return float(damage)
        return math.inf


Order = Mapping[int, Sequence[int]]
"""The experts of each block in some order."""


def chances(mixture: Mixture, what: str) -> Iterator[Order]:
    """Orders by chance."""
    for number in range(CHANCES):
        generator = random.Random(derived_seed("mixture", what, number))
        yield {block: generator.sample(range(N_EXPERTS), N_EXPERTS) for block in mixture.used}


def reverse(order: Order) -> Order:
    """The same, last first."""
    return {block: list(reversed(experts)) for block, experts in order.items()}


def tiers(order: Order, bits: Sequence[int]) -> dict[Expert, str]:
    """So many bits for the first experts of each block, fewer for the next, and so on."""
    size = N_EXPERTS // len(bits)
    return {
        (block, expert): gptq(bits[place // size])
        for block, experts in order.items()
        for place, expert in enumerate(experts)
    }


def widths(mixture: Mixture) -> Iterator[list[Arm]]:
    """Bits of all experts, and bits that differ between experts at the same bytes."""
    for bits in BITS:
        for text in (rtn(bits), gptq(bits)):
            everywhere = dict.fromkeys(mixture.layers, text)
            yield [Arm(f"experts {text}", mixture.allocation(everywhere))]
    for name, bits_of_tiers in TIERS.items():
        orders: dict[str, list[Order]] = {
            "by use": [mixture.used],
            "by least use": [reverse(mixture.used)],
            "by chance": list(chances(mixture, name)),
        }
        for by, found in orders.items():
            yield [
                Arm(f"{name} {by}", mixture.allocation(tiers(order, bits_of_tiers)))
                for order in found
            ]
    yield [Arm("bits by predicted damage", mixture.allocation(by_prediction(mixture)))]


def by_prediction(mixture: Mixture) -> dict[Expert, str]:
    """2, 3 or 4 bits per expert, 3 in the mean, of the least predicted damage."""
    damage = [
        np.array([mixture.predicted(expert, gptq(bits)) for bits in BITS])
        for expert in mixture.layers
    ]
    levels = solve_exactly(damage, [np.array(BITS)] * len(damage), 3 * len(damage))
    return {e: gptq(BITS[level]) for e, level in zip(mixture.layers, levels, strict=True)}


def routers_and_attention(mixture: Mixture) -> Iterator[list[Arm]]:
    """Routers alone, attention alone, and routers beside experts of 4 bits."""
    attention = [
        layer.name
        for layer in mixture.session.base.layout.layers
        if layer.role in {"query", "key", "value", "output"}
    ]
    for bits in BITS:
        router = Scheme.parse(rtn(bits))
        rounded = partial(rounded_routers, mixture.module, router)
        saved = router_savings(mixture.module, router)
        scheme = Scheme.parse(gptq(bits))
        yield [Arm(f"attention {scheme}", Allocation.of(dict.fromkeys(attention, scheme)))]
        yield [Arm(f"routers {rtn(bits)}", routers=rounded, saved=saved)]
    four = mixture.allocation(dict.fromkeys(mixture.layers, gptq(4)))
    yield [Arm(f"experts {gptq(4)}, routers {rtn(4)}", four, rounded, saved)]


def fewer(mixture: Mixture) -> Iterator[list[Arm]]:
    """Dropped and merged experts, so many of each block, or that times the blocks of all."""
    for n in DROPPED:
        dropped: dict[str, list[Order]] = {
            "least used": [first(reverse(mixture.used), n)],
            "least predicted": [first(least_predicted(mixture), n)],
            "by chance": [first(order, n) for order in chances(mixture, "drop")],
            "least predicted anywhere": [least_predicted_anywhere(mixture, n)],
        }
        for name, draws in dropped.items():
            for sent_on in (False, True):
                yield [dropping(mixture, f"drop {n} {name}", gone, sent_on) for gone in draws]
        for to in ("mean", "busiest"):
            schemes = merged(reverse(mixture.used), n, to)
            yield [Arm(f"merge {n} pairs to the {to}", mixture.allocation(schemes))]
    eight = dict.fromkeys(mixture.layers, gptq(8))
    half = all_dropped(least_predicted_anywhere(mixture, N_EXPERTS // 2))
    yield [Arm(HALF, mixture.allocation({**eight, **half}))]


def first(order: Order, n: int) -> Order:
    """The first `n` experts of each block."""
    return {block: experts[:n] for block, experts in order.items()}


def least_predicted(mixture: Mixture) -> Order:
    """By what dropping an expert is predicted to damage; the most used ones stay."""
    ranked = ranked_by_prediction(mixture)
    return {block: [e for b, e in ranked if b == block] for block in mixture.used}


def least_predicted_anywhere(mixture: Mixture, n: int) -> Order:
    """As many as `n` of each block would be, whatever their blocks."""
    ranked = ranked_by_prediction(mixture)[: n * len(mixture.used)]
    return {block: [e for b, e in ranked if b == block] for block in mixture.used}


def ranked_by_prediction(mixture: Mixture) -> list[Expert]:
    """All experts, those that are missed least first."""
    return sorted(mixture.layers, key=lambda expert: mixture.predicted(expert, "drop"))


def dropping(mixture: Mixture, name: str, gone: Order, sent_on: bool) -> Arm:
    """Experts dropped, their tokens lost or sent to the others."""
    allocation = mixture.allocation(all_dropped(gone))
    if not sent_on:
        return Arm(name, allocation)
    routers = partial(fewer_routed, mixture.module, gone)
    return Arm(f"{name}, tokens sent on", allocation, routers)


def all_dropped(gone: Order) -> dict[Expert, str]:
    """The scheme of every expert that goes."""
    return {(block, e): "drop" for block, experts in gone.items() for e in experts}


def merged(order: Order, n: int, to: str) -> dict[Expert, str]:
    """The first `2 n` experts of each block, each merged with the next."""
    return {
        (block, expert): f"merged(to={to},experts={'/'.join(map(str, sorted(pair)))})"
        for block, experts in order.items()
        for pair in (experts[start : start + 2] for start in range(0, 2 * n, 2))
        for expert in pair
    }
