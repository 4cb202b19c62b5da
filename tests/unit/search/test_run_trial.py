from dataclasses import replace

import pytest
import torch

from autocompress.core import (
    BASE_ALLOCATION,
    Allocation,
    Scheme,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.search.run_trial import run_guarded, run_trial
from autocompress.testing.driver_contract import LAYERS, scripted, scripted_context, value_of


@pytest.fixture
def context(tmp_path):
    return scripted_context(tmp_path)


def uniform(number, bits):
    scheme = Scheme.parse(f"rtn(bits={bits},group_size=16)")
    return TrialRequest(number, Allocation.of(dict.fromkeys(LAYERS, scheme)), "test")


def test_the_base_allocation_does_no_damage(context):
    result = run_trial(TrialRequest(0, BASE_ALLOCATION, "baseline:base"), context=context)
    assert result.is_complete
    assert result.metrics.quality.damage.value == 0.0
    assert result.metrics.quality.retained == 1.0
    assert result.metrics.storage_bytes == context.layout.base_bytes
    assert result.n_tokens == 16


def test_more_bits_do_less_damage_and_weigh_more(context):
    results = [run_trial(uniform(b, b), context=context) for b in (2, 4, 8)]
    damages = [r.metrics.quality.damage.value for r in results]
    assert damages == sorted(damages, reverse=True)
    sizes = [r.metrics.storage_bytes for r in results]
    assert sizes == sorted(sizes)


def test_a_trial_equals_the_model_with_its_weights_replaced_by_hand(context):
    result = run_trial(uniform(0, 3), context=context)
    copy = scripted_context(context.bank.root / "other").module
    for name in LAYERS:
        dense = context.bank.dense(name, Scheme.parse("rtn(bits=3,group_size=16)"), torch.float32)
        copy.get_submodule(name).weight = torch.nn.Parameter(dense.clone(), requires_grad=False)
    quality = context.task.measure(copy, context.split, context.reference, batch_size=8)
    assert result.metrics.quality == quality


def test_order_does_not_matter(tmp_path):
    requests = [uniform(0, 2), scripted(1, "fail"), scripted(2, "nan"), uniform(3, 5)]
    one, two = scripted_context(tmp_path / "a"), scripted_context(tmp_path / "b")
    forward = [value_of(run_trial(r, context=one)) for r in requests]
    backward = [value_of(run_trial(r, context=two)) for r in reversed(requests)]
    assert forward == backward[::-1]


@pytest.mark.parametrize("script", ["rtn(bits=2)", "fail", "exhaust", "nan"])
def test_a_trial_leaves_no_trace_on_the_base_model(context, script):
    before = {n: (p, p.clone()) for n, p in context.module.named_parameters()}
    run_trial(scripted(0, script), context=context)
    for name, parameter in context.module.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize(
    ("script", "status", "error"),
    [
        ("fail", TrialStatus.FAILED, "ValueError: scripted failure"),
        ("exhaust", TrialStatus.OUT_OF_MEMORY, "MemoryError: scripted exhaustion"),
        ("nan", TrialStatus.NOT_FINITE, "The compressed model's outputs are not finite"),
        ("no_such_method", TrialStatus.FAILED, "Unknown compression method 'no_such_method'"),
    ],
)
def test_each_way_to_fail_is_a_status_of_its_own(context, script, status, error):
    result = run_trial(scripted(0, script), context=context)
    assert result.status is status
    assert error in result.error
    assert "\n" not in result.error
    assert result.metrics is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
        MemoryError(),
    ],
)
def test_torch_running_out_of_memory_is_recognised(context, monkeypatch, error):
    def score(*args, **kwargs):
        raise error

    monkeypatch.setattr(type(context.task), "score", score)
    result = run_trial(uniform(0, 4), context=context)
    assert result.status is TrialStatus.OUT_OF_MEMORY


def test_an_interrupt_is_not_swallowed_and_the_model_is_restored(context, monkeypatch):
    def score(*args, **kwargs):
        raise KeyboardInterrupt

    before = dict(context.module.named_parameters())
    monkeypatch.setattr(type(context.task), "score", score)
    with pytest.raises(KeyboardInterrupt):
        run_trial(uniform(0, 4), context=context)
    assert all(p is before[n] for n, p in context.module.named_parameters())


def test_a_broken_base_is_not_called_compressed(context):
    broken = {"outputs": context.reference["outputs"] * torch.nan}
    result = run_trial(
        TrialRequest(0, BASE_ALLOCATION, "baseline:base"),
        context=replace(context, reference=broken, rungs=()),
    )
    assert result.status is TrialStatus.NOT_FINITE
    assert result.error.startswith("The base model's outputs are not finite")


def test_a_write_to_the_base_model_is_noticed(context):
    outcome = run_guarded(scripted(0, "scribble"), context=context)
    assert outcome.tainted
    assert outcome.result.status is TrialStatus.FAILED
    assert "second.weight" in outcome.result.error
    assert not run_guarded(uniform(1, 4), context=context).tainted


def test_a_write_to_a_compressed_weight_is_noticed_and_undone(context, monkeypatch):
    honest = type(context.task).score
    expected = run_trial(uniform(0, 4), context=context)

    def scribbling(self, module, *args, **kwargs):
        module.get_submodule("first").weight.mul_(3.0)
        return honest(self, module, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(context.task), "score", scribbling)
        outcome = run_guarded(uniform(0, 4), context=context)
    assert outcome.result.status is TrialStatus.FAILED
    assert "compressed weights" in outcome.result.error
    assert not outcome.tainted
    again = run_trial(uniform(0, 4), context=context)
    assert again.metrics == expected.metrics


def test_shared_prefixes_change_nothing_but_the_work(tmp_path):
    plain = replace(scripted_context(tmp_path / "a"), prefix_bytes=0)
    shared = scripted_context(tmp_path / "b")
    third = {**dict(uniform(0, 4).allocation), "third": Scheme.parse("rtn(bits=2)")}
    requests = [uniform(0, 4), TrialRequest(1, Allocation.of(third), "test"), uniform(2, 4)]
    for request in requests:
        expected, got = (run_trial(request, context=c) for c in (plain, shared))
        assert value_of(got) == value_of(expected)
    assert shared.prefix.reason == ""
    assert shared.prefix.counts.computed == 2 * (3 + 1 + 0)  # two batches
    assert shared.prefix.counts.blocks == 2 * 3 * 3
    assert plain.prefix.counts.blocks == 0


def test_what_methods_say_is_in_the_notes_once_with_the_layers(context):
    schemes = dict.fromkeys(LAYERS, Scheme.parse("gptq(bits=4,group_size=16)"))
    request = TrialRequest(0, Allocation.of(schemes), "test")
    plain = replace(
        context, bank=type(context.bank).__mro__[1].__new__(type(context.bank).__mro__[1])
    )
    plain.bank.__setstate__(context.bank.__getstate__())
    result = run_trial(request, context=plain)
    assert result.is_complete
    assert len(result.notes) == 1
    assert result.notes[0].startswith("first and 2 more: ")


def test_the_noise_of_the_dtype_is_part_of_the_error_bar(context):
    quiet = run_trial(uniform(0, 3), context=context).metrics.quality
    loud = replace(context, noise=0.5, retained_noise=0.1)
    noisy = run_trial(uniform(0, 3), context=loud).metrics.quality
    assert noisy.damage.value == quiet.damage.value
    expected = (quiet.damage.standard_error**2 + 0.25) ** 0.5
    assert noisy.damage.standard_error == pytest.approx(expected)
    assert noisy.standard_error == pytest.approx((quiet.standard_error**2 + 0.01) ** 0.5)


def test_a_result_survives_the_journal(context):
    result = run_trial(uniform(3, 4), context=context)
    again = TrialResult.from_json(result.to_json())
    assert value_of(again) == value_of(result)
