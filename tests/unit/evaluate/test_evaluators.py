from __future__ import annotations

import math
import pickle

import pytest

from autocompress.evaluate import TASKS
from autocompress.testing.evaluators import (
    EvaluationFailedError,
    FailingTask,
    NoisyTask,
    NotFiniteTask,
    SlowTask,
)


def measured(task, setting):
    reference = task.reference(setting.module, setting.split, batch_size=4)
    return task.measure(setting.module, setting.split, reference, batch_size=4)


def test_noise_is_a_function_of_what_was_measured_and_is_stated(setting):
    task = NoisyTask(setting.task, scale=0.1)
    once, again = measured(task, setting), measured(task, setting)
    plain = measured(setting.task, setting)
    assert once == again
    assert once.damage.value != plain.damage.value
    assert once.standard_error == pytest.approx(0.1, abs=1e-3)


def test_a_failing_task_fails_for_its_share(setting):
    with pytest.raises(EvaluationFailedError, match="100%"):
        measured(FailingTask(setting.task), setting)
    assert measured(FailingTask(setting.task, share=0.0), setting) == measured(
        setting.task, setting
    )


def test_a_task_that_is_not_finite_answers_nan(setting):
    assert math.isnan(measured(NotFiniteTask(setting.task), setting).retained)
    assert measured(NotFiniteTask(setting.task, share=0.0), setting).is_finite


def test_a_slow_task_gives_the_same_answer(setting):
    assert measured(SlowTask(setting.task, seconds=0.0), setting) == measured(setting.task, setting)


def test_wrapped_tasks_describe_themselves_as_what_they_wrap_and_survive_pickling():
    task = NoisyTask(SlowTask(TASKS["causal-lm"], seconds=0.0))
    again = pickle.loads(pickle.dumps(task))
    assert again.name == "causal-lm"
    assert again.damage == "kl_nats_per_token"
    assert again.auto_class == "AutoModelForCausalLM"
    assert again.default_data == "python-docs"
