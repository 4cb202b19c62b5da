import pytest
import torch

from autocompress.core.errors import UsageError
from autocompress.evaluate import TaskLoss, curvature_batches
from autocompress.evaluate.batching import IGNORED
from autocompress.evaluate.curvature_loss import SAMPLE, summed_cross_entropy


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_labels_of_the_data_give_the_cross_entropy_and_its_gradient():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator(), requires_grad=True)
    targets = torch.randint(7, (2, 5), generator=generator(1))
    targets[1, 3:] = IGNORED
    loss = summed_cross_entropy(logits, targets, generator())
    (gradient,) = torch.autograd.grad(2 * loss, logits)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
    )
    (expected_gradient,) = torch.autograd.grad(2 * expected, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_labels_are_drawn_from_the_model():
    logits = torch.tensor([[2.0, 0.0, 1.0, -20.0]]).expand(20_000, 4).clone().requires_grad_()
    loss = summed_cross_entropy(logits, torch.full((20_000,), SAMPLE), generator())
    (gradient,) = torch.autograd.grad(loss, logits)
    probabilities = logits.detach()[0].softmax(0)
    drawn = (probabilities - gradient).mean(0)
    torch.testing.assert_close(drawn, probabilities, atol=0.012, rtol=0)


def test_every_task_has_a_loss_that_padding_does_not_change(setting):
    """Units are what its damage averages; one sequence at a time scores as many."""
    task, module, split = setting.task, setting.module, setting.split
    (whole,) = task.curvature_batches(split, 1000)
    single = task.curvature_batches(split, 1)
    assert task.n_scored(whole) == sum(task.n_scored(batch) for batch in single)
    loss, n_units = TaskLoss(task)(module, whole, generator())
    assert n_units == task.n_scored(whole)
    assert loss.requires_grad
    again, _ = TaskLoss(task)(module, whole, generator())
    assert torch.equal(loss, again)
    if task.name == "feature-extraction":
        return
    by_data = TaskLoss(task, empirical=True)
    together = by_data(module, whole, generator())[0].item()
    apart = sum(by_data(module, batch, generator())[0].item() for batch in single)
    assert together == pytest.approx(apart, rel=1e-4)


def test_embeddings_have_no_labels_to_be_empirical_about(setting):
    if setting.task.name != "feature-extraction":
        return
    batch = setting.task.curvature_batches(setting.split, 2)[0]
    with pytest.raises(UsageError, match=r"has none\. Next step: leave out --empirical"):
        setting.task.curvature_loss(setting.module, batch, generator(), empirical=True)


def test_a_large_vocabulary_goes_one_sequence_at_a_time(setting, monkeypatch):
    sizes = [len(next(iter(b.values()))) for b in _batches(setting)]
    assert max(sizes) == 8
    monkeypatch.setattr("autocompress.evaluate.curvature_loss._BATCH_LOGITS", 1)
    assert {len(next(iter(b.values()))) for b in _batches(setting)} == {1}


def _batches(setting):
    return curvature_batches(setting.task, setting.module, setting.split)
