from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autocompress.core import Measurement, Quality
from autocompress.core.errors import UsageError
from autocompress.evaluate import ForwardPlan, Split, forward_plan, plan_forward, with_noise

SPLIT = Split.of("search", [{"input_ids": torch.arange(40) + i} for i in range(20)])


def quality(damage: float, error: float = 0.0) -> Quality:
    measured = Measurement(damage, error)
    return Quality(1.0 - damage, error, measured, {"kl": measured}, 10)


class Clock:
    """Stands for the machine: seconds of a pass by dtype, threads and batch size."""

    def __init__(self, seconds, noise=None) -> None:
        self.seconds, self.noise = seconds, noise or {}
        self.passes: list[tuple[str, int, int]] = []

    def as_method(self):
        def run(sample, module, batch_size):
            dtype = str(module.weight.dtype).removeprefix("torch.")
            key = (dtype, torch.get_num_threads(), batch_size)
            self.passes.append(key)
            return quality(self.noise.get(dtype, 0.0)), self.seconds(*key)

        return run


TASK = SimpleNamespace(reference=lambda module, split, batch_size: {})


def load(dtype: str) -> nn.Module:
    return nn.Linear(2, 2).to(getattr(torch, dtype))


@pytest.fixture
def plan(monkeypatch):
    def make(seconds, noise=None, kernels=None, **options):
        clock = Clock(seconds, noise)
        monkeypatch.setattr(forward_plan._Sample, "run", clock.as_method())
        monkeypatch.setattr(
            forward_plan, "_matmul_seconds", lambda dtype, _: (kernels or {}).get(dtype, 1.0)
        )
        made = plan_forward(load, TASK, SPLIT, threads=options.pop("threads", (1,)), **options)
        return made, clock

    return make


def by_dtype(**seconds: float):
    return lambda dtype, threads, batch: seconds[dtype]


def test_the_fastest_dtype_is_taken_with_its_noise(plan):
    made, _ = plan(by_dtype(float32=3.0, bfloat16=1.0), noise={"bfloat16": 0.003})
    assert made.dtype == "bfloat16"
    assert made.noise == pytest.approx(0.003)
    assert made.retained_noise == pytest.approx(0.003)
    assert made.seconds_per_dtype == {"float32": 3.0, "bfloat16": 1.0}
    assert made.ruled_out == {"float32": "3.0 times the seconds of bfloat16"}


def test_a_slower_dtype_is_left(plan):
    made, _ = plan(by_dtype(float32=1.0, bfloat16=2.0))
    assert (made.dtype, made.noise) == ("float32", 0.0)


@pytest.mark.parametrize("noise", [0.5, math.nan])
def test_a_dtype_that_damages_the_base_is_left(plan, noise):
    made, _ = plan(by_dtype(float32=3.0, bfloat16=1.0), noise={"bfloat16": noise})
    assert made.dtype == "float32"
    assert "damages the base model" in made.ruled_out["bfloat16"]


def test_a_dtype_without_hardware_is_ruled_out_before_the_model_is_loaded_in_it(plan):
    made, clock = plan(by_dtype(float32=3.0, bfloat16=1.0), kernels={torch.bfloat16: 30.0})
    assert made.dtype == "float32"
    assert "30.0 times" in made.ruled_out["bfloat16"]
    assert all(dtype == "float32" for dtype, _, _ in clock.passes)


def test_float16_is_for_cuda(plan):
    made, _ = plan(by_dtype(float32=3.0), dtypes=("float32", "float16"))
    assert made.ruled_out["float16"] == "float16 is for CUDA devices"


def test_a_required_dtype_is_taken_whatever_it_costs_and_its_noise_is_known(plan):
    made, _ = plan(
        by_dtype(float32=1.0, bfloat16=9.0),
        noise={"bfloat16": 0.5},
        kernels={torch.bfloat16: 30.0},
        required="bfloat16",
    )
    assert (made.dtype, made.noise) == ("bfloat16", 0.5)


def test_threads_and_batch_size_are_the_fastest(plan):
    made, _ = plan(
        lambda dtype, threads, batch: (3 - threads) + {1: 0.9, 4: 0.4, 16: 0.7, 64: 0.7}[batch],
        dtypes=("float32",),
        threads=(1, 2),
    )
    assert (made.threads, made.batch_size) == (2, 4)


def test_more_threads_or_memory_must_be_worth_it(plan):
    made, _ = plan(lambda *_: 1.0, dtypes=("float32",), threads=(1, 2), batch_sizes=(4,))
    assert made.threads == 1


def test_threads_are_those_of_the_machine_that_was_measured(plan, monkeypatch):
    monkeypatch.setattr(forward_plan, "usable_cores", lambda: 8)
    made, _ = plan(lambda *_: 1.0, dtypes=("float32",), threads=(1, 8), batch_sizes=(4,))
    again = ForwardPlan.from_json(made.to_json())
    assert [again.threads_on(cores) for cores in (8, 2, 64)] == [1, 2, 64]


def test_a_plan_of_an_earlier_version_takes_all_cores(plan):
    written = plan(lambda *_: 1.0, dtypes=("float32",))[0].to_json()
    del written["cores"]
    assert ForwardPlan.from_json(written).threads_on(2) == 2


def test_threads_are_as_before_afterwards(plan):
    before = torch.get_num_threads()
    plan(lambda dtype, threads, batch: 1.0 / threads, threads=(1, 2, 3))
    assert torch.get_num_threads() == before


def test_a_slow_model_is_not_swept(plan, monkeypatch):
    monkeypatch.setattr(forward_plan, "_SWEEP_SECONDS", -1.0)
    _, clock = plan(by_dtype(float32=1.0), dtypes=("float32",), threads=(1, 2))
    assert len(set(clock.passes)) == 1


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UsageError, match="Did you mean 'bfloat16'"):
        plan_forward(load, TASK, SPLIT, dtypes=("bfloat",))


def test_a_real_task_is_planned_and_the_plan_survives_json(setting):
    made = plan_forward(
        lambda dtype: setting.fresh_module().to(getattr(torch, dtype)),
        setting.task,
        setting.split,
        threads=(1,),
        batch_sizes=(4,),
        required="bfloat16",
    )
    assert made.dtype == "bfloat16"
    assert 0 < made.noise < 1
    assert made.noise_per_dtype["bfloat16"].value > 0
    assert ForwardPlan.from_json(made.to_json()) == made


def test_noise_adds_to_the_errors_in_quadrature_and_leaves_the_values():
    noisy = with_noise(quality(0.1, error=0.03), damage=0.04, retained=0.4)
    assert noisy.damage == Measurement(0.1, pytest.approx(0.05))
    assert noisy.metrics["kl"] == noisy.damage
    assert noisy.standard_error == pytest.approx(math.hypot(0.03, 0.4))
    assert noisy.retained == 0.9
