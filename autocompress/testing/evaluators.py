"""Tasks that wrap another and make it noisy, failing or slow, to test what runs trials.

Each is a function of the quality that was measured, never of how often or in which order it was
asked: a trial gives the same result on every worker and after every resume.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from autocompress.core import Measurement, Quality, derived_seed
from autocompress.evaluate import Corpus, Example, Reference, Scores, Split, Task

if TYPE_CHECKING:
    from autocompress.evaluate import CorpusKind


class EvaluationFailedError(RuntimeError):
    """What a failing task raises."""


@dataclass(frozen=True)
class WrappedTask(Task):
    """Does as the task that it wraps; subclasses change `score` or `summarise`."""

    wrapped: Task

    @property
    def name(self) -> str:  # type: ignore[override]  # a class attribute of ordinary tasks
        """The wrapped task's name."""
        return self.wrapped.name

    @property
    def auto_class(self) -> str:  # type: ignore[override]  # see `name`
        """The wrapped task's class of transformers."""
        return self.wrapped.auto_class

    @property
    def corpus_kind(self) -> CorpusKind:  # type: ignore[override]  # see `name`
        """The wrapped task's kind of corpus."""
        return self.wrapped.corpus_kind

    @property
    def default_data(self) -> str | None:  # type: ignore[override]  # see `name`
        """The wrapped task's default data."""
        return self.wrapped.default_data

    @property
    def damage(self) -> str:  # type: ignore[override]  # see `name`
        """The wrapped task's damage."""
        return self.wrapped.damage

    @property
    def summary(self) -> str:  # type: ignore[override]  # see `name`
        """The wrapped task's summary."""
        return self.wrapped.summary

    def encode(
        self,
        corpus: Corpus,
        processor: object,
        *,
        sequence_length: int,
        seed: int,
        config: object = None,
    ) -> list[Example]:
        """See `Task.encode`."""
        return self.wrapped.encode(
            corpus, processor, sequence_length=sequence_length, seed=seed, config=config
        )

    def batches(self, split: Split, batch_size: int) -> list[dict[str, Tensor]]:
        """See `Task.batches`."""
        return self.wrapped.batches(split, batch_size)

    def reference(self, module: nn.Module, split: Split, *, batch_size: int) -> Reference:
        """See `Task.reference`."""
        return self.wrapped.reference(module, split, batch_size=batch_size)

    def rows(self, reference: Reference, split: Split, start: int, stop: int) -> Reference:
        """See `Task.rows`."""
        return self.wrapped.rows(reference, split, start, stop)

    def score(
        self, module: nn.Module, split: Split, reference: Reference, *, batch_size: int
    ) -> Scores:
        """See `Task.score`."""
        return self.wrapped.score(module, split, reference, batch_size=batch_size)

    def damages(self, scores: Scores) -> Tensor:
        """See `Task.damages`."""
        return self.wrapped.damages(scores)

    def summarise(self, scores: Scores, split: Split, reference: Reference) -> Quality:
        """See `Task.summarise`."""
        return self.wrapped.summarise(scores, split, reference)

    def tokens_per_pass(self, split: Split) -> int:
        """See `Task.tokens_per_pass`."""
        return self.wrapped.tokens_per_pass(split)


@dataclass(frozen=True)
class NoisyTask(WrappedTask):
    """Adds normal noise to damage and retained quality, and says so in the standard errors.

    Attributes:
        scale: standard deviation of the noise.
        seed: of the noise.
    """

    scale: float = 0.01
    seed: int = 0

    def summarise(self, scores: Scores, split: Split, reference: Reference) -> Quality:
        """The wrapped task's quality with noise."""
        quality = super().summarise(scores, split, reference)
        draw = _draw("noise", self.seed, quality)
        damage = quality.damage
        return replace(
            quality,
            retained=quality.retained + draw.gauss(0.0, self.scale),
            standard_error=math.hypot(quality.standard_error, self.scale),
            damage=Measurement(
                damage.value + draw.gauss(0.0, self.scale),
                math.hypot(damage.standard_error, self.scale),
            ),
        )


@dataclass(frozen=True)
class FailingTask(WrappedTask):
    """Raises `EvaluationFailedError` for a share of the qualities.

    Attributes:
        share: from 0 (never) to 1 (always).
        seed: decides which qualities fail.
    """

    share: float = 1.0
    seed: int = 0

    def summarise(self, scores: Scores, split: Split, reference: Reference) -> Quality:
        """The wrapped task's quality, or an error."""
        quality = super().summarise(scores, split, reference)
        if _draw("failure", self.seed, quality).random() < self.share:
            raise EvaluationFailedError(
                f"A failing task fails {self.share:.0%} of its trials, and this is one of them."
            )
        return quality


@dataclass(frozen=True)
class NotFiniteTask(WrappedTask):
    """Answers NaN, as a broken model does, for a share of the qualities.

    Attributes:
        share: from 0 (never) to 1 (always).
        seed: decides which qualities are NaN.
    """

    share: float = 1.0
    seed: int = 0

    def summarise(self, scores: Scores, split: Split, reference: Reference) -> Quality:
        """The wrapped task's quality, or NaN."""
        quality = super().summarise(scores, split, reference)
        if _draw("not finite", self.seed, quality).random() >= self.share:
            return quality
        return replace(quality, retained=math.nan, damage=Measurement(math.nan, math.nan))


@dataclass(frozen=True)
class SlowTask(WrappedTask):
    """Sleeps before it answers.

    Attributes:
        seconds: how long.
    """

    seconds: float = 1.0

    def score(
        self, module: nn.Module, split: Split, reference: Reference, *, batch_size: int
    ) -> Scores:
        """The wrapped task's scores, later."""
        time.sleep(self.seconds)
        return super().score(module, split, reference, batch_size=batch_size)


def _draw(purpose: str, seed: int, quality: Quality) -> random.Random:
    """A generator that depends on the quality alone; seven digits, as the rest is rounding."""
    return random.Random(derived_seed(purpose, seed, f"{quality.damage.value:.7g}"))
