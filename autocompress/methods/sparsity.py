"""What the sparsifiers share: exact counts, deterministic ties, N:M patterns, refitting."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Stage
from autocompress.methods.base import Needs, Sparsifier, SparsityOptions
from autocompress.methods.problem import LayerProblem
from autocompress.methods.refit import refitted

_ANY_SPARSITY = SparsityOptions().sparsity
_WIDEST = 64
_DEFAULTS = {"pattern": "", "refit": False}

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True, slots=True)
class PruningOptions(SparsityOptions):
    """Options of sparsifiers that know patterns and refitting.

    Attributes:
        sparsity: share of the weights that become zero; follows from the pattern if there is one.
        pattern: "N:M" keeps exactly N of every M consecutive inputs of a row, e.g. "2:4"; empty:
            the zeros may be anywhere. (Quote it in YAML, which reads 2:4 as a number.)
        refit: choose the values of the kept weights anew, so that they make up for the pruned
            ones best: see `refitted`.
    """

    pattern: str = ""
    refit: bool = False

    def __post_init__(self) -> None:
        # `super()` without arguments does not work in dataclasses with slots.
        if self.pattern:
            kept, width = _parsed(self.pattern)
            share = 1 - kept / width
            if not (self.sparsity == _ANY_SPARSITY or math.isclose(self.sparsity, share)):
                raise SchemeError(
                    f"sparsity must be left out or agree with the pattern {self.pattern}, which "
                    f"is {share:g}, but got {self.sparsity}. Leave one of the two out."
                )
            object.__setattr__(self, "sparsity", share)
            object.__setattr__(self, "pattern", f"{kept}:{width}")
        SparsityOptions.__post_init__(self)

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """(N, M) of the pattern; None if there is none."""
        return _parsed(self.pattern) if self.pattern else None


@dataclass(frozen=True, eq=False)
class Pruned:
    """What a method finds that chooses mask and values together.

    Attributes:
        mask: (o, d) bool, True where the weight is kept.
        values: (o, d) float32, zero where it is not; None if the weights stay as they are.
        notes: for people.
    """

    mask: Tensor
    values: Tensor | None
    notes: tuple[str, ...] = ()


class JointSparsifier(Sparsifier[OptionsT]):
    """A sparsifier that finds mask and values together, once for both."""

    @abstractmethod
    def prune(self, problem: LayerProblem, options: OptionsT) -> Pruned:
        """The mask, of `n_kept` weights, the values and notes."""

    def mask(self, problem: LayerProblem, options: OptionsT) -> tuple[Tensor, tuple[str, ...]]:
        """See `Sparsifier.mask`."""
        pruned = self._pruned(problem, options)
        return pruned.mask, pruned.notes

    def values(
        self,
        problem: LayerProblem,
        mask: Tensor,  # noqa: ARG002 - its own
        options: OptionsT,
    ) -> Tensor | None:
        """See `Sparsifier.values`."""
        return self._pruned(problem, options).values

    def _pruned(self, problem: LayerProblem, options: OptionsT) -> Pruned:
        return problem.latest((self, options), lambda: self.prune(problem, options))


class PruningSparsifier(JointSparsifier[PruningOptions]):
    """A sparsifier with `PruningOptions`; those that change nothing are left out of its schemes."""

    options = PruningOptions

    @abstractmethod
    def choose(self, problem: LayerProblem, options: PruningOptions) -> Pruned:
        """As `prune`, but for refitting."""

    def prune(self, problem: LayerProblem, options: PruningOptions) -> Pruned:
        """See `JointSparsifier.prune`."""
        chosen = self.choose(problem, options)
        if not options.refit:
            return chosen
        if problem.unseen:
            note = f"kept weights were not refitted: {problem.unseen}"
            return replace(chosen, notes=(*chosen.notes, note))
        return replace(chosen, values=refitted(problem, chosen.mask))

    def canonical(self, stage: Stage) -> Stage:
        """See `Method.canonical`."""
        options = dict(Sparsifier.canonical(self, stage).options)
        for name, default in _DEFAULTS.items():
            if options[name] == default:
                del options[name]
        return Stage.of(stage.method, options)

    def refusal(self, shape: tuple[int, int], options: PruningOptions) -> str:
        """See `Method.refusal`; M must divide the inputs."""
        pattern, d = options.kept_of, shape[1]
        if pattern is None or d % pattern[1] == 0:
            return ""
        return (
            f"pattern={options.pattern} needs a multiple of {pattern[1]} inputs, but got {d}. "
            f"{_nearest_pattern(pattern, d)}"
        )

    def needs_of(self, options: PruningOptions) -> Needs:
        """See `Method.needs_of`."""
        return Needs.HESSIAN if options.refit else self.needs


def n_kept_of(n: int, sparsity: float) -> int:
    """Weights kept of `n`: all but the nearest integer to ``sparsity * n``, at least one."""
    return max(1, n - round(sparsity * n))


def keep_highest(scores: Tensor, n_kept: int) -> Tensor:
    """True at the `n_kept` highest scores of each row of (rows, n); of ties the first are dropped.

    Selects a threshold instead of sorting, which is several times faster on large rows.
    """
    n_dropped = scores.shape[1] - n_kept
    if n_dropped == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(n_dropped, dim=1, keepdim=True).values
    lower, tied = scores < threshold, scores == threshold
    quota = n_dropped - lower.sum(1, keepdim=True)
    dropped = lower | (tied & (tied.cumsum(1) <= quota))
    return ~dropped


def keep_pattern(scores: Tensor, pattern: tuple[int, int]) -> Tensor:
    """True at the N highest of every M consecutive scores of each row of (o, d); M divides d.

    Compares each score with the others of its M, so that no small row is sorted by itself.
    """
    kept, width = pattern
    grouped = scores.reshape(-1, width).T.contiguous()
    n_higher = torch.zeros_like(grouped, dtype=torch.int16)
    for i in range(width):
        n_higher[:i] += grouped[i] >= grouped[:i]  # of ties the first are dropped
        n_higher[i + 1 :] += grouped[i] > grouped[i + 1 :]
    return (n_higher < kept).T.reshape(scores.shape)


def _parsed(pattern: str) -> tuple[int, int]:
    """(N, M) of "N:M"."""
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", pattern)
    kept, width = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < kept < width <= _WIDEST:
        raise SchemeError(
            "pattern must be N:M, the N of every M inputs that are kept, with N at least 1 and "
            f"below M, and M at most {_WIDEST}, but got {pattern!r}. A legal value is 2:4."
        )
    return kept, width


def _nearest_pattern(pattern: tuple[int, int], d: int) -> str:
    """What to do instead of a pattern whose M does not divide `d`."""
    shared = math.gcd(*pattern)
    kept, width = pattern[0] // shared, pattern[1] // shared
    for scale in range(shared, 0, -1):
        if d % (width * scale) == 0:
            return f"The nearest legal value is {kept * scale}:{width * scale}."
    return f"Leave the pattern out and give sparsity={1 - kept / width:g}."
