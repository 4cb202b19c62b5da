"""Differentiable damages are those that trials measure."""

import pytest
import torch

from autocompress.core.errors import UsageError
from autocompress.evaluate import TASKS, Split
from autocompress.evaluate.task import Task
from autocompress.testing.tiny_models import Sizes, tiny_model

SIZES = Sizes(hidden=16, intermediate=16, blocks=1, heads=2, key_value_heads=1)
FAMILIES = {
    "causal-lm": "llama",
    "text-classification": "bert-classifier",
    "feature-extraction": "bert-encoder",
}


def examples(n_labels):
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(5, 320, (n,), generator=generator) for n in (9, 7, 5, 9))
    return [
        {"input_ids": ids, "labels": torch.tensor(i % n_labels), "pad_token_id": torch.tensor(0)}
        for i, ids in enumerate(drawn)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_divergence_of_answers_is_the_damage_of_scores(name):
    task = TASKS[name]
    base, other = (tiny_model(FAMILIES[name], seed=seed, sizes=SIZES) for seed in (0, 1))
    split = Split.of("calibration", examples(getattr(base.config, "num_labels", 2)))
    if name == "text-classification":  # its reference wants a model that beats chance
        reference = {"logprobs": task._logprobs(base, split, 2)}
    else:
        reference = task.reference(base, split, batch_size=2)
    expected = task.damages(task.score(other, split, reference, batch_size=2)).sum()
    found = 0.0
    for batch in task.curvature_batches(split, 2):
        answers = task.answers(other, batch)
        assert answers.requires_grad
        found += float(task.divergence(answers, task.answers(base, batch)).detach())
    assert found == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_a_task_without_answers_says_so():
    with pytest.raises(UsageError, match=r"override `Task\.answers`"):
        Task.answers(TASKS["causal-lm"], torch.nn.Linear(1, 1), {})
