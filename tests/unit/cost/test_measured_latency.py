"""Latency from measured times: sums against hand arithmetic, and what stands in for the missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autocompress.core import BASE_ALLOCATION, Allocation, ExpertOf, LayerSpec, Scheme
from autocompress.core.errors import UsageError
from autocompress.cost import CostModel, DeviceProfile, LatencyTable, LayerTime, PassTimes
from autocompress.cost.latency import layers_digest
from autocompress.cost.model import time_key
from autocompress.methods import canonical


def _linear(name: str, rows: int, columns: int) -> LayerSpec:
    return LayerSpec(name, "down", 0, rows, columns, "linear", "float32", name, rows * columns)


UP, DOWN = _linear("up", 128, 64), _linear("down", 64, 128)
LOOKUP = LayerSpec("embedding", "embedding", None, 1000, 64, "embedding", "float32", None, 0)
LAYERS = (UP, DOWN, LOOKUP)
FOUR = canonical(Scheme.parse("rtn(bits=4,group_size=64)"))
THREE = canonical(Scheme.parse("rtn(bits=3,group_size=64)"))
DEVICE = DeviceProfile("mine", 1e6, 1e5, 10**9, "made up")


def _pass(n_tokens: int, rest: float, factor: float = 1.0) -> PassTimes:
    times = {
        time_key(UP, Scheme()): LayerTime(0.4 * factor, 0.1),
        time_key(UP, FOUR): LayerTime(0.2 * factor, 0.1),
        time_key(DOWN, Scheme()): LayerTime(0.3 * factor, 0.1),
        time_key(LOOKUP, Scheme()): LayerTime(0.1 * factor, 0.1),
    }
    return PassTimes(n_tokens, rest, times)


def _model(tokens_per_pass: int = 10, layers: tuple[LayerSpec, ...] = LAYERS) -> CostModel:
    table = LatencyTable(
        "m", layers_digest(LAYERS), "float32", (_pass(10, 1.0), _pass(30, 3.0, factor=2.0))
    )
    return CostModel(layers, 4096, 500, replace(DEVICE, latency=table), tokens_per_pass)


def _latency(model: CostModel, allocation: Allocation = BASE_ALLOCATION):
    return model.resources(allocation)["latency_ms_per_token"]


def test_the_latency_is_that_of_the_layers_and_the_rest_over_the_tokens():
    base = _latency(_model())
    assert base.value == pytest.approx(1e3 * (0.4 + 0.3 + 0.1 + 1.0) / 10)
    assert (base.unit, base.origin) == ("ms", "measured on mine in float32")
    packed = _latency(_model(), Allocation.of({"up": FOUR}))
    assert packed.value == pytest.approx(base.value - 1e3 * 0.2 / 10)
    assert packed.origin == base.origin


def test_between_two_numbers_of_tokens_times_are_linear_in_them():
    found = _latency(_model(tokens_per_pass=15))
    assert found.value == pytest.approx(1e3 * (1.25 * 0.8 + 1.5) / 15)
    assert found.origin == "measured on mine in float32, interpolated to 15 tokens"


@pytest.mark.parametrize("n_tokens", [9, 31])
def test_beyond_what_was_measured_the_roofline_counts_and_says_why(n_tokens):
    model = _model(n_tokens)
    plain = replace(model, profile=DEVICE)
    assert _latency(model).value == _latency(plain).value
    assert _latency(model).origin == (
        "analytic (roofline of mine; its times are of m at 10, 30 tokens, not of this model at "
        f"{n_tokens})"
    )


def test_times_of_another_model_do_not_count():
    other = (UP, _linear("down", 64, 256), LOOKUP)
    assert _latency(_model(layers=other)).origin.startswith("analytic (roofline of mine; its")


def test_a_layer_that_was_not_measured_scales_its_roofline_as_like_layers_do():
    model, plain = _model(), replace(_model(), profile=DEVICE)
    # layers shaped as `up` took 4 and 2 times their roofline; all of them 4, 2, 3 and 1 times
    assert model.part(UP, THREE).seconds(DEVICE) == pytest.approx(
        3.0 * plain.part(UP, THREE).seconds(DEVICE)
    )
    other = _linear("other", 256, 64)
    assert model.part(other, FOUR).seconds(DEVICE) == pytest.approx(
        2.5 * plain.part(other, FOUR).seconds(DEVICE)
    )
    origin = _latency(model, Allocation.of({"up": THREE})).origin
    assert origin == (
        "measured on mine in float32, 2 of 3 layers; the others by their scaled roofline"
    )


def test_what_the_parts_add_is_the_whole():
    model = _model(15)
    allocation = Allocation.of({"up": THREE, "down": FOUR})
    parts = [model.rest, *(model.part(x, allocation.scheme(x.name)) for x in LAYERS)]
    summed = sum(part.additive(model.profile)["latency_ms_per_token"] for part in parts)
    assert summed == pytest.approx(_latency(model, allocation).value)


def test_layers_that_do_the_same_have_one_key():
    gptq = canonical(Scheme.parse("gptq(bits=4,group_size=64)"))
    assert time_key(UP, gptq) == time_key(replace(UP, name="other", block=3), FOUR)
    tied = replace(LOOKUP, macs_per_token=64_000, aliases=("head",))
    shared = Scheme.parse("basis_sharing(blocks=0/1,rank=8)")
    alone = Scheme.parse("svd(rank=8)")
    layer = _linear("layers.0.up", 64, 64)
    different = [
        time_key(UP, Scheme()),
        time_key(UP, FOUR),
        time_key(UP, THREE),
        time_key(DOWN, FOUR),
        time_key(replace(UP, kind="conv1d"), FOUR),
        time_key(replace(UP, expert=ExpertOf(0, 8, 2)), FOUR),
        time_key(LOOKUP, FOUR),
        time_key(tied, FOUR),
        time_key(layer, canonical(shared)),
        time_key(layer, canonical(alone)),
    ]
    assert len(set(different)) == len(different)


def test_times_that_make_no_sense_are_refused():
    good = {"linear 8x4: base": LayerTime(1.0, 1.0)}
    for seconds, roofline in ((-1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(UsageError, match="measure the device again"):
            LayerTime(seconds, roofline)
    for arguments in ((0, 1.0, good), (1, -1.0, good), (1, 1.0, {})):
        with pytest.raises(UsageError, match="measure the device again"):
            PassTimes(*arguments)
    with pytest.raises(UsageError, match=r"rising numbers of tokens, but got \[4, 2\]"):
        LatencyTable("m", "x", "float32", (PassTimes(4, 1.0, good), PassTimes(2, 1.0, good)))
