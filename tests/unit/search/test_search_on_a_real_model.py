"""Space, methods, statistics, task and costs together, on a tiny transformer."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from autocompress.bank import Bank
from autocompress.cost import DEFAULT_PROFILE, PROFILES, CostModel
from autocompress.drivers.local import LocalDriver
from autocompress.evaluate import TASKS, Split
from autocompress.models import StatisticsStore, collect_statistics, describe, weight_matrix
from autocompress.search import SAMPLERS, Budget, Journal, Study, TrialContext
from autocompress.spaces import load_space
from autocompress.testing.tiny_models import tiny_model


def tokens(seed, n=6, length=24):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 320, (length,), generator=generator) for _ in range(n)]
    return [{"input_ids": each, "pad_token_id": torch.tensor(0)} for each in ids]


def context_of(family: str, directory: Path) -> TrialContext:
    module = tiny_model(family).eval()
    layout = describe(module)
    task = TASKS["causal-lm"]
    split = Split.of("search", tokens(1))
    store = StatisticsStore(directory / "statistics")
    calibration = Split.of("calibration", tokens(2))
    collect_statistics(module, layout, task.batches(calibration, 4), store)
    weights = {layer.name: weight_matrix(module, layer) for layer in layout.layers}
    return TrialContext(
        module=module,
        layout=layout,
        bank=Bank(directory / "bank", layout, weights, store.get),
        task=task,
        split=split,
        reference=task.reference(module, split, batch_size=4),
        cost=CostModel(
            layout.layers, layout.other_bytes, layout.other_macs_per_token,
            PROFILES[DEFAULT_PROFILE],
        ),
        batch_size=4,
        threads=1,
    )  # fmt: skip


def search(directory, context, driver, budget="14 trials"):
    space = load_space("joint", context.layout.layers)
    with Journal(directory / "trials.jsonl") as journal, closing(driver):
        sampler = SAMPLERS["nsga2"](space, seed=0)
        return Study(space, sampler, driver, journal, Budget.parse(budget)).run()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_joint_search_measures_every_trial_and_leaves_the_model_alone(tmp_path, family):
    context = context_of(family, tmp_path)
    before = {name: tensor.clone() for name, tensor in context.module.state_dict().items()}
    results = search(tmp_path, context, LocalDriver(context))
    assert [r.error for r in results if not r.is_complete] == []
    base = results[0].metrics
    assert base.quality.damage.value == pytest.approx(0.0, abs=1e-6)
    assert base.storage_bytes == context.layout.base_bytes
    assert all(r.metrics.storage_bytes < base.storage_bytes for r in results[1:])
    assert all(r.metrics.quality.damage.value > 0 for r in results[1:])
    for name, tensor in context.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.slow
def test_a_ray_worker_agrees_with_this_process_on_a_real_model(tmp_path):
    from autocompress.drivers.ray import RayDriver, start_ray, stop_ray

    local = context_of("llama", tmp_path / "local")
    expected = search(tmp_path / "local", local, LocalDriver(local), "10 trials")
    context = context_of("llama", tmp_path / "ray")
    started = start_ray(workers=1)
    found = search(tmp_path / "ray", context, RayDriver(context, workers=1), "10 trials")
    if started:
        stop_ray()
    assert [r.request for r in found] == [r.request for r in expected]
    for one, two in zip(found, expected, strict=True):
        assert one.metrics.resources == two.metrics.resources
        assert one.metrics.quality.damage.value == pytest.approx(
            two.metrics.quality.damage.value, rel=1e-5, abs=1e-9
        )
