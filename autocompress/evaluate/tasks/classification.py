"""What the classification tasks share: one distribution over classes per example."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from autocompress.core import Quality
from autocompress.core.errors import ModelError
from autocompress.evaluate.batching import batch_indices, place
from autocompress.evaluate.curvature_loss import SAMPLE, summed_cross_entropy
from autocompress.evaluate.divergence import lumped_kl
from autocompress.evaluate.estimators import mean, ratio_of_sums
from autocompress.evaluate.splits import Example, Split, count_tokens
from autocompress.evaluate.task import Reference, Scores, Task


class ClassificationTask(Task):
    """A task that picks one of the model's labels."""

    damage: ClassVar[str] = "kl_nats_per_example"

    @abstractmethod
    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Padded model inputs."""

    def tokens_per_pass(self, split: Split) -> int:
        """The mean length of a sequence."""
        return max(1, round(split.n_tokens / len(split)))

    def batches(self, split: Split, batch_size: int) -> list[dict[str, Tensor]]:
        """See `Task.batches`."""
        groups = batch_indices([count_tokens(e) for e in split.examples], batch_size)
        return [self._collate([split.examples[i] for i in group]) for group in groups]

    def curvature_batches(self, split: Split, batch_size: int) -> list[dict[str, Tensor]]:
        """See `Task.curvature_batches`."""
        groups = batch_indices([count_tokens(e) for e in split.examples], batch_size)
        parts = [[split.examples[i] for i in group] for group in groups]
        labels = [torch.stack([e["labels"] for e in part]) for part in parts]
        return [{**self._collate(part), "labels": y} for part, y in zip(parts, labels, strict=True)]

    def curvature_loss(
        self,
        module: nn.Module,
        batch: dict[str, Tensor],
        generator: torch.Generator,
        *,
        empirical: bool = False,
    ) -> Tensor:
        """See `Task.curvature_loss`."""
        labels = batch["labels"] if empirical else torch.full_like(batch["labels"], SAMPLE)
        return summed_cross_entropy(_logits(module, batch), labels, generator)

    def answers(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """See `Task.answers`; one row per example."""
        return _logits(module, batch).float().log_softmax(1)

    def reference(self, module: nn.Module, split: Split, *, batch_size: int) -> Reference:
        """``logprobs`` (n, classes), float32, of the base model."""
        logprobs = self._logprobs(module, split, batch_size)
        if not bool(logprobs.isfinite().all()):
            raise ModelError(
                f"The base model must answer with finite numbers, but its logits on the "
                f"{split.name} examples hold NaN or infinity. Load it in another dtype (--dtype "
                "float32) or check its weights."
            )
        labels = _labels(split)
        accuracy = float(_correct(logprobs, labels).mean())
        chance = _chance(labels)
        if accuracy <= chance:
            raise ModelError(
                f"The base model must beat chance, but on the {split.name} examples its accuracy "
                f"is {accuracy:.3f} and the best constant answer has {chance:.3f}. Check that the "
                "data's labels are numbered or named as in the model's config (label2id), use a "
                "model trained for them, or give more examples."
            )
        return {"logprobs": logprobs}

    def rows(self, reference: Reference, split: Split, start: int, stop: int) -> Reference:  # noqa: ARG002
        """See `Task.rows`; views."""
        return {"logprobs": reference["logprobs"][start:stop]}

    def score(
        self, module: nn.Module, split: Split, reference: Reference, *, batch_size: int
    ) -> Scores:
        """``correct``, ``agrees`` and ``kl`` (n,) of each example."""
        logprobs = self._logprobs(module, split, batch_size)
        base = reference["logprobs"]
        return {
            "correct": _correct(logprobs, _labels(split)),
            "agrees": _unless_nan((logprobs.argmax(1) == base.argmax(1)).double(), logprobs),
            "kl": lumped_kl(base, logprobs, complete=True).double(),
        }

    def damages(self, scores: Scores) -> Tensor:
        """Nats of each example."""
        return scores["kl"]

    def summarise(self, scores: Scores, split: Split, reference: Reference) -> Quality:
        """See `Task.summarise`; retained quality is ``(acc - chance) / (base acc - chance)``.

        Chance is the accuracy of the best constant answer on the split.
        """
        labels = _labels(split)
        chance = _chance(labels)
        correct, base_correct = scores["correct"], _correct(reference["logprobs"], labels)
        damage = mean(scores["kl"])
        retained = ratio_of_sums(correct - chance, base_correct - chance)
        return Quality(
            retained=retained.value,
            standard_error=retained.standard_error,
            damage=damage,
            metrics={
                "accuracy": mean(correct),
                self.damage: damage,
                "top1_agreement": mean(scores["agrees"]),
            },
            n_tokens=split.n_tokens,
        )

    def _logprobs(self, module: nn.Module, split: Split, batch_size: int) -> Tensor:
        """Log-probabilities of the classes in the split's order: (n, classes), float32, CPU."""
        _check_problem(module)
        size = batch_size if _pads(module) else 1
        rows: list[Tensor | None] = [None] * len(split)
        for group in batch_indices([count_tokens(e) for e in split.examples], size):
            batch = self._collate([split.examples[i] for i in group])
            with torch.no_grad():
                logits = module(**place(batch, module)).logits
            for index, row in zip(group, logits.float().log_softmax(1).cpu(), strict=True):
                rows[index] = row
        return torch.stack([row for row in rows if row is not None])


def _logits(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (n, classes) of a batch of `curvature_batches`, in the graph."""
    _check_problem(module)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = module(**place(inputs, module)).logits
    return logits


def _pads(module: nn.Module) -> bool:
    """False for a classifier on a decoder that cannot tell padding, so takes one text at a time."""
    config = getattr(module, "config", None)
    is_text = hasattr(config, "vocab_size")
    return not is_text or getattr(config, "pad_token_id", None) is not None


def _check_problem(module: nn.Module) -> None:
    config = getattr(module, "config", None)
    n_labels = int(getattr(config, "num_labels", 2))
    problem = getattr(config, "problem_type", None)
    if n_labels < 2 or problem in ("regression", "multi_label_classification"):
        raise ModelError(
            f"Classification picks one of at least two labels, but the model has {n_labels} "
            f"(problem_type {problem!r}). Regression and multi-label models are not supported."
        )


def _labels(split: Split) -> Tensor:
    return torch.stack([example["labels"] for example in split.examples])


def _correct(logprobs: Tensor, labels: Tensor) -> Tensor:
    """1 where the most likely class is the label, NaN where the outputs are: (n,), float64."""
    return _unless_nan((logprobs.argmax(1) == labels).double(), logprobs)


def _unless_nan(values: Tensor, logprobs: Tensor) -> Tensor:
    return values.masked_fill(logprobs.isnan().any(1), torch.nan)


def _chance(labels: Tensor) -> float:
    return float(labels.bincount().max()) / labels.numel()
