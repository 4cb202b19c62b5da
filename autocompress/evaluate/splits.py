"""Calibration, search and report tokens: disjoint by construction."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from autocompress.core import derived_seed, digest
from autocompress.core.errors import DataError

Example = Mapping[str, Tensor]
"""Unbatched inputs of one sequence: ``input_ids`` (length,) or ``pixel_values`` (channels, height,
width), ``labels``, ``positive_input_ids``. Two scalars may go along that are no model inputs:
``n_tokens`` where the number cannot be read off the ids, and ``pad_token_id``."""

_CONTENT = ("input_ids", "positive_input_ids", "pixel_values")
_MIN_SEQUENCES = 2  # a standard error needs two


def count_tokens(example: Example) -> int:
    """Tokens of one example: ``n_tokens`` if it says so, else its ids and those of its positive."""
    if "n_tokens" in example:
        return int(example["n_tokens"])
    return sum(example[n].numel() for n in ("input_ids", "positive_input_ids") if n in example)


def content_keys(example: Example) -> frozenset[str]:
    """Digests of what the model reads; examples that share one are duplicates of each other."""
    return frozenset(tensor_digest(example[name]) for name in _CONTENT if name in example)


@dataclass(frozen=True)
class Split:
    """Sequences that are evaluated together.

    Attributes:
        name: ``calibration``, ``search`` or ``report``.
        examples: in the order in which per-sequence results are kept.
        n_tokens: tokens of all examples.
    """

    name: str
    examples: tuple[Example, ...]
    n_tokens: int

    @classmethod
    def of(cls, name: str, examples: Iterable[Example]) -> Split:
        """A split with its tokens counted."""
        kept = tuple(examples)
        return cls(name, kept, sum(map(count_tokens, kept)))

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def digest(self) -> str:
        """Stable across processes; equal for equal examples in equal order."""
        return digest([[[n, tensor_digest(e[n])] for n in sorted(e)] for e in self.examples])

    def head(self, n_sequences: int) -> Split:
        """The first sequences of this split."""
        return Split.of(self.name, self.examples[:n_sequences])


@dataclass(frozen=True)
class Splits:
    """Three disjoint splits.

    Statistics are gathered on the first, candidates compared on the second, and the front
    published on the third.
    """

    calibration: Split
    search: Split
    report: Split

    @property
    def digest(self) -> str:
        """Stable across processes; equal for equal splits."""
        return digest([self.calibration.digest, self.search.digest, self.report.digest])


def make_splits(
    examples: Sequence[Example],
    *,
    calibration_tokens: int,
    search_tokens: int,
    report_tokens: int,
    seed: int,
) -> Splits:
    """Deal sequences into three disjoint splits of at least the given numbers of tokens.

    Sequences whose content was seen before are dropped first, so that no text is in two splits.
    Neighbouring windows of one document may be dealt to different ones, and errors take sequences
    as independent: data of few long documents looks more certain than it is.
    Report tokens are dealt first: asking for more calibration or search tokens never changes
    what a front is published on.

    Args:
        examples: encoded sequences, in any order.
        calibration_tokens: tokens for statistics; rounded up to whole sequences, at least two.
        search_tokens: likewise, for comparing candidates.
        report_tokens: likewise, for publishing.
        seed: of the shuffle.

    Raises:
        DataError: there are not enough different sequences; says how many tokens there are.
    """
    budgets = {
        "report": report_tokens,
        "search": search_tokens,
        "calibration": calibration_tokens,
    }
    _check_budgets(budgets)
    unique = _without_duplicates(examples)
    order = list(range(len(unique)))
    random.Random(derived_seed("splits", seed)).shuffle(order)
    dealt: dict[str, Split] = {}
    position = 0
    for name, budget in budgets.items():
        taken: list[Example] = []
        tokens = 0
        while position < len(order) and (tokens < budget or len(taken) < _MIN_SEQUENCES):
            taken.append(unique[order[position]])
            tokens += count_tokens(taken[-1])
            position += 1
        if tokens < budget or len(taken) < _MIN_SEQUENCES:
            raise DataError(_too_short(unique, len(examples), budgets))
        dealt[name] = Split(name, tuple(taken), tokens)
    return Splits(dealt["calibration"], dealt["search"], dealt["report"])


def _check_budgets(budgets: Mapping[str, int]) -> None:
    for name, budget in budgets.items():
        if budget < 1:
            raise DataError(
                f"--{name}-tokens must be at least 1, but got {budget}. Each split needs tokens."
            )


def _without_duplicates(examples: Sequence[Example]) -> list[Example]:
    seen: set[str] = set()
    unique = []
    for example in examples:
        keys = content_keys(example)
        if keys.isdisjoint(seen):
            seen |= keys
            unique.append(example)
    return unique


def _too_short(unique: Sequence[Example], n_given: int, budgets: Mapping[str, int]) -> str:
    available = sum(map(count_tokens, unique))
    wanted = sum(budgets.values())
    duplicates = n_given - len(unique)
    dropped = f" ({duplicates} duplicates were dropped)" if duplicates else ""
    # a tenth less than the proportional share, as splits end on whole sequences
    scale = 0.9 * min(1.0, available / wanted)
    options = ", ".join(
        f"--{name}-tokens {max(1, int(scale * budgets[name]))}"
        for name in ("calibration", "search", "report")
    )
    return (
        f"The data is too short: {wanted} tokens are needed (calibration "
        f"{budgets['calibration']}, search {budgets['search']}, report {budgets['report']}; at "
        f"least {_MIN_SEQUENCES} sequences each), but there are {available} tokens in "
        f"{len(unique)} different sequences{dropped}. Give more data, lower the tokens, e.g. "
        f"{options}, or lower --sequence-length."
    )


def tensor_digest(tensor: Tensor) -> str:
    """Of dtype, shape and values; stable across processes."""
    data = tensor.detach().cpu().contiguous()
    header = f"{data.dtype}{tuple(data.shape)}".encode()
    return hashlib.blake2b(header + data.numpy().tobytes(), digest_size=16).hexdigest()
