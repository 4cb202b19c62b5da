"""What the language-modelling tasks share: token by token, against the base's distribution."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn

from autocompress.core import Quality
from autocompress.core.errors import ModelError
from autocompress.evaluate.batching import IGNORED, batch_indices, place, vocabulary_size
from autocompress.evaluate.curvature_loss import SAMPLE, summed_cross_entropy
from autocompress.evaluate.divergence import BaseRows, keep_base, score
from autocompress.evaluate.estimators import exponential, ratio_of_sums
from autocompress.evaluate.splits import Example, Split
from autocompress.evaluate.task import Reference, Scores, Task

_BATCH_LOGITS = 1 << 26
"""Logits held at once: the batch is cut so that batch x length x vocabulary stays below, as far as
one sequence allows. 128 MiB in bfloat16."""
_CHUNK_LOGITS = {"cpu": 1 << 20}
"""Logits that are scored at once in float32: few enough for a CPU's cache."""
_CHUNK_LOGITS_OTHER = 1 << 27
_KEPT = ("nll", "ids", "logprobs")


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Scored positions of one batch.

    Attributes:
        logits: shape ``(n, vocabulary)``, float32, a copy that may be overwritten.
        targets: shape ``(n,)``, on the device of `logits`.
        rows: where the positions lie among all scored positions of the split, ``(n,)``, CPU.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor


class LanguageTask(Task):
    """A task that predicts tokens."""

    damage: ClassVar[str] = "kl_nats_per_token"

    @abstractmethod
    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Padded model inputs."""

    @abstractmethod
    def _inputs(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the module's forward takes of a collated batch."""

    @abstractmethod
    def _targets(self, examples: Sequence[Example], batch: dict[str, Tensor]) -> Tensor:
        """The token that each position predicts, `IGNORED` where none: (batch, length)."""

    @abstractmethod
    def _n_targets(self, example: Example) -> int:
        """How many positions of an example are scored."""

    @abstractmethod
    def _n_logits(self, example: Example) -> int:
        """How many positions of an example get logits."""

    def batches(self, split: Split, batch_size: int) -> list[dict[str, Tensor]]:
        """See `Task.batches`."""
        groups = batch_indices([self._n_logits(e) for e in split.examples], batch_size)
        return [self._collate([split.examples[i] for i in group]) for group in groups]

    def reference(self, module: nn.Module, split: Split, *, batch_size: int) -> Reference:
        """``nll`` (n,), ``ids`` (n, k) int32 and ``logprobs`` (n, k) of the n scored positions."""
        n_rows = sum(map(self._n_targets, split.examples))
        tensors: dict[str, Tensor] = {}
        for chunk in self._chunks(module, split, batch_size):
            base = keep_base(chunk.logits, chunk.targets)
            for name, part in (("nll", base.nll), ("ids", base.ids), ("logprobs", base.logprobs)):
                if name not in tensors:
                    tensors[name] = part.new_empty((n_rows, *part.shape[1:]), device="cpu")
                tensors[name][chunk.rows] = part.cpu()
        if not (bool(tensors["nll"].isfinite().all()) and _has_mass(tensors["logprobs"])):
            raise ModelError(
                f"The base model must answer with finite numbers, but its logits on the "
                f"{split.name} tokens hold NaN or infinity. Load it in another dtype (--dtype "
                "float32) or check its weights."
            )
        return tensors

    def rows(self, reference: Reference, split: Split, start: int, stop: int) -> Reference:
        """See `Task.rows`; views of the scored positions."""
        ends = [0, *accumulate(map(self._n_targets, split.examples))]
        return {name: tensor[ends[start] : ends[stop]] for name, tensor in reference.items()}

    def score(
        self, module: nn.Module, split: Split, reference: Reference, *, batch_size: int
    ) -> Scores:
        """``nll``, ``kl`` and ``agrees`` (n,), summed over the scored positions of a sequence."""
        scores = {n: torch.empty_like(reference["nll"]) for n in ("nll", "kl", "agrees")}
        for chunk in self._chunks(module, split, batch_size):
            device = chunk.logits.device
            nll, ids, logprobs = (reference[n][chunk.rows].to(device) for n in _KEPT)
            base = BaseRows(nll, ids, logprobs)
            got = score(chunk.logits, chunk.targets, base)
            for name, part in (("nll", got.nll), ("kl", got.kl), ("agrees", got.agrees)):
                scores[name][chunk.rows] = part.cpu()
        counts = self._counts(split)
        return {name: _per_sequence(values, counts) for name, values in scores.items()}

    def damages(self, scores: Scores) -> Tensor:
        """Nats of each sequence."""
        return scores["kl"]

    def summarise(self, scores: Scores, split: Split, reference: Reference) -> Quality:
        """See `Task.summarise`; retained quality is the base's perplexity over the model's."""
        counts = self._counts(split)
        base_nll = _per_sequence(reference["nll"], counts)
        return _quality(scores, base_nll, counts, split.n_tokens)

    def _counts(self, split: Split) -> Tensor:
        return torch.tensor([self._n_targets(e) for e in split.examples])

    def curvature_loss(
        self,
        module: nn.Module,
        batch: dict[str, Tensor],
        generator: torch.Generator,
        *,
        empirical: bool = False,
    ) -> Tensor:
        """See `Task.curvature_loss`."""
        targets = self._targets((), batch)
        if not empirical:
            targets = targets.masked_fill(targets != IGNORED, SAMPLE)
        return summed_cross_entropy(self._forward(module, batch), targets, generator)

    def answers(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """See `Task.answers`; one row per position that predicts a token."""
        logits = self._forward(module, batch)
        scored = (self._targets((), batch).flatten() != IGNORED).nonzero()[:, 0]
        return logits.flatten(0, 1)[scored.to(logits.device)].float().log_softmax(1)

    def n_scored(self, batch: dict[str, Tensor]) -> int:
        """The positions that predict a token."""
        return int((self._targets((), batch) != IGNORED).sum())

    def _chunks(self, module: nn.Module, split: Split, batch_size: int) -> Iterator[_Chunk]:
        """Forward the split and yield its scored positions, a bounded number at a time."""
        vocabulary = vocabulary_size(module)
        lengths = [self._n_logits(e) for e in split.examples]
        fitting = max(1, _BATCH_LOGITS // (max(lengths) * vocabulary))
        starts = _starts([self._n_targets(e) for e in split.examples])
        for group in batch_indices(lengths, min(batch_size, fitting)):
            examples = [split.examples[i] for i in group]
            batch = self._collate(examples)
            targets = self._targets(examples, batch).flatten()
            rows = torch.cat(
                [starts[i] + torch.arange(self._n_targets(split.examples[i])) for i in group]
            )
            logits = self._logits(module, batch)
            yield from _cut(logits.flatten(0, 1), targets, rows)

    def _logits(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self._forward(module, batch)

    def _forward(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        inputs = place(self._inputs(module, batch), module)
        # a cache of keys and values is of no use to a single forward
        takes_cache = "use_cache" in inspect.signature(module.forward).parameters
        output = module(**inputs, **({"use_cache": False} if takes_cache else {}))
        logits: Tensor = output.logits
        return logits


def _cut(logits: Tensor, targets: Tensor, rows: Tensor) -> Iterator[_Chunk]:
    device = logits.device
    budget = _CHUNK_LOGITS.get(device.type, _CHUNK_LOGITS_OTHER)
    size = max(1, budget // logits.shape[1])
    scored = (targets != IGNORED).nonzero()[:, 0]
    for positions, part in zip(torch.split(scored, size), torch.split(rows, size), strict=True):
        yield _Chunk(
            logits=logits.index_select(0, positions.to(device)).float(),
            targets=targets[positions].to(device),
            rows=part,
        )


def _has_mass(logprobs: Tensor) -> bool:
    """False if a row holds NaN or infinity where its most likely token is."""
    return bool(logprobs[:, 0].isfinite().all()) and not bool(logprobs.isnan().any())


def _starts(counts: Sequence[int]) -> list[int]:
    starts = [0]
    for count in counts[:-1]:
        starts.append(starts[-1] + count)
    return starts


def _per_sequence(values: Tensor, counts: Tensor) -> Tensor:
    """Sums over the scored positions of each sequence: (n,), float64."""
    owner = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    zeros = torch.zeros(counts.numel(), dtype=torch.float64)
    return zeros.index_add(0, owner, values.double())


def _quality(scores: Scores, base_nll: Tensor, counts: Tensor, n_tokens: int) -> Quality:
    """Estimate over sequences, of which `scores` and `base_nll` hold sums.

    ``retained = exp(mean base nll - mean nll)``; its error comes from the paired differences of
    each sequence, which is far smaller than that of the perplexity.
    """
    retained = exponential(ratio_of_sums(base_nll - scores["nll"], counts))
    damage = ratio_of_sums(scores["kl"], counts)
    return Quality(
        retained=retained.value,
        standard_error=retained.standard_error,
        damage=damage,
        metrics={
            "perplexity": exponential(ratio_of_sums(scores["nll"], counts)),
            "kl_nats_per_token": damage,
            "top1_agreement": ratio_of_sums(scores["agrees"], counts),
        },
        n_tokens=n_tokens,
    )
