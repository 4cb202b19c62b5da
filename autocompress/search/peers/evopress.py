"""EvoPress: (1 + lambda) evolution by level switches at fixed sizes.

Sieberling, Kuznedelev, Kurtic, Alistarh 2024, arXiv 2410.14649. An offspring has one to three
switches (the minimum of two uniform draws): a choice goes up a level and another one down, so that
the size stays. Where steps are unequal (4 to 6 bits) as many others follow as that takes: with the
paper's pairs such levels could not be reached. The fittest replaces the parent if it is better.

The paper selects in stages, many offspring on few tokens and the survivors on more (`evolve`); a
trial of ours always measures all search tokens, so the sampler selects in one stage among fewer
offspring. It takes several sizes in turn, since a front is asked for where the paper aims at one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.core import derived_seed
from autocompress.search.option_table import PerChoice
from autocompress.search.peers.base import BatchSampler, Levels, Measured
from autocompress.search.sampler import SAMPLERS

_MOST_SWITCHES = 3
_SLACK = 0.02  # of a size; neighbouring levels of unequal layers do not add up exactly
_DRAWS = 64
_N_SIZES = 7


@dataclass(frozen=True, eq=False)
class Switching:
    """Level switches between a smallest and a largest size.

    Attributes:
        costs: bytes of each level, one array per choice, ascending.
        max_bytes: of the searched layers.
    """

    costs: PerChoice
    max_bytes: float

    def fits(self, levels: Sequence[int]) -> bool:
        """True if the size is right."""
        return self.max_bytes * (1 - _SLACK) <= self._size(levels) <= self.max_bytes

    def offspring(self, parent: Levels, generator: np.random.Generator) -> Levels | None:
        """A parent with some levels switched; None if no draw keeps the size."""
        for _ in range(_DRAWS):
            levels = list(parent)
            for _ in range(int(generator.integers(1, _MOST_SWITCHES + 1, size=2).min())):
                self._switch(levels, generator)
            if tuple(levels) != parent and self.fits(levels):
                return tuple(levels)
        return None

    def _switch(self, levels: list[int], generator: np.random.Generator) -> None:
        """One choice up or down a level, then others the other way until the size is back."""
        upwards = bool(generator.random() < 0.5)
        moved = self._move(levels, generator, up=upwards, other_than=None)
        for _ in range(len(levels)):
            if moved is None or self.fits(levels):
                return
            if (self._size(levels) > self.max_bytes) != upwards:
                return  # stepped over the range
            self._move(levels, generator, up=not upwards, other_than=moved)

    def _move(
        self, levels: list[int], generator: np.random.Generator, *, up: bool, other_than: int | None
    ) -> int | None:
        """Move one choice by a level; every second time one of the same sizes as `other_than`."""
        can = [
            i
            for i, (level, cost) in enumerate(zip(levels, self.costs, strict=True))
            if i != other_than and (level < len(cost) - 1 if up else level > 0)
        ]
        if other_than is not None and generator.random() < 0.5:
            sizes = self.costs[other_than]
            can = [i for i in can if np.array_equal(self.costs[i], sizes)] or can
        if not can:
            return None
        choice = can[int(generator.integers(len(can)))]
        levels[choice] += 1 if up else -1
        return choice

    def _size(self, levels: Sequence[int]) -> float:
        return sum(float(c[level]) for c, level in zip(self.costs, levels, strict=True))

    def start(self, generator: np.random.Generator) -> Levels:
        """The largest uniform allocation that fits, random choices raised while they fit."""
        widest = max(len(c) for c in self.costs)
        levels = [0] * len(self.costs)
        for level in range(widest):
            uniform = [min(level, len(c) - 1) for c in self.costs]
            if self._size(uniform) > self.max_bytes:
                break
            levels = uniform
        left = self.max_bytes - self._size(levels)
        for i in generator.permutation(len(levels)):
            if levels[i] < len(self.costs[i]) - 1:
                added = float(self.costs[i][levels[i] + 1] - self.costs[i][levels[i]])
                if added <= left:
                    levels[i] += 1
                    left -= added
        return tuple(levels)


@SAMPLERS.register("evopress")
class EvoPress(BatchSampler):
    """One generation per batch, the sizes in turn; the parent is the best of its size so far."""

    name = "evopress"
    summary = "peer: evolution by level switches at fixed sizes (EvoPress), one stage"

    def _batch(self, first: int, known: Sequence[Measured]) -> Iterator[Levels]:
        """A generation of offspring, or first allocations of a size that has no parent."""
        generation = first // self.batch_size
        switching = Switching(self.costs, self._size(generation))
        generator = self.generator("generation", first)
        fitting = [entry for entry in known if switching.fits(entry.levels)]
        parent = min(fitting, key=lambda e: (e.damage, e.number), default=None)
        for _ in range(4 * self.batch_size):
            child = None if parent is None else switching.offspring(parent.levels, generator)
            yield child or switching.start(generator)

    def _size(self, generation: int) -> float:
        low = sum(float(c.min()) for c in self.costs)
        high = sum(float(c.max()) for c in self.costs)
        return low + (high - low) * (generation % _N_SIZES + 1) / (_N_SIZES + 1)


@dataclass(frozen=True, slots=True)
class Stage:
    """So many survive a selection on so many tokens."""

    survivors: int
    tokens: int


PAPER_STAGES = (Stage(16, 2_048), Stage(4, 16_384), Stage(1, 131_072))
"""Multi-stage selection of the paper's quantization runs, with 128 offspring."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The parent after a generation, and all tokens that were spent until then."""

    parent: Levels
    tokens: int


def evolve(
    costs: PerChoice,
    max_bytes: float,
    evaluate: Callable[[Levels, int, int], float],
    *,
    generations: int,
    offspring: int = 128,
    stages: Sequence[Stage] = PAPER_STAGES,
    seed: int = 0,
) -> Iterator[Generation]:
    """The paper's search at one size, with selection in stages.

    Args:
        costs: bytes of each level, one array per choice.
        max_bytes: of the searched layers.
        evaluate: damage of levels, on so many tokens, of the draw with this number: all
            candidates of a stage meet the same tokens, every stage draws new ones.
        generations: how many.
        offspring: per generation; the parent competes in the last stage.
        stages: of the selection.
        seed: of everything that is drawn.
    """
    switching = Switching(costs, max_bytes)
    generator = np.random.default_rng(derived_seed("evolve", seed))
    parent, spent, draw = switching.start(generator), 0, 0
    for _ in range(generations):
        drawn = (switching.offspring(parent, generator) for _ in range(offspring))
        alive = list(dict.fromkeys(child for child in drawn if child is not None))
        for stage in stages:
            if stage is stages[-1]:
                alive.append(parent)
            damages = {levels: evaluate(levels, stage.tokens, draw) for levels in alive}
            spent += stage.tokens * len(alive)
            draw += 1
            alive = sorted(alive, key=damages.__getitem__)[: stage.survivors]
        parent = alive[0]
        yield Generation(parent, spent)
