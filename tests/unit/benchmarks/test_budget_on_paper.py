from __future__ import annotations

import json

import budget_on_paper
import pytest
from budget_on_paper import Laws, fit, memory, preparation, trial_seconds
from model_shapes import ARCHITECTURES

from autocompress.cost.profiles import PROFILES

GPU = PROFILES["h100-sxm"]
LAWS = Laws(hessian=4e-11, factor=1e-10, factor_memory=2e-7, sweep=2e-11, grid=2e-7)


@pytest.mark.parametrize(
    ("name", "weights", "active"),
    [("7B", 6.74e9, 6.6e9), ("70B", 70.6e9, 69.5e9), ("400B MoE", 400.7e9, 16.1e9)],
)
def test_shapes_have_the_weights_of_the_public_models(name, weights, active):
    shape = ARCHITECTURES[name]
    assert shape.weights == pytest.approx(weights, rel=0.01)
    assert shape.active_weights == pytest.approx(active, rel=0.02)


def test_a_fit_recovers_the_laws_that_made_the_numbers():
    rows = [
        {
            "out_features": o,
            "in_features": d,
            "hessian_seconds": LAWS.hessian * budget_on_paper.TOKENS_PER_PRODUCT * d**2,
            "factor_seconds": LAWS.factor_seconds(d),
            "option_seconds": LAWS.option_seconds(o, d),
        }
        for o, d in budget_on_paper.SIZES
    ]
    laws, misses = fit(rows)
    for name in ("hessian", "factor", "factor_memory", "sweep", "grid"):
        assert getattr(laws, name) == pytest.approx(getattr(LAWS, name), rel=1e-6)
    assert max(misses.values()) < 1e-6


def test_memory_of_the_7b_is_that_of_its_shapes():
    counted = memory(ARCHITECTURES["7B"], GPU.memory_bytes)
    assert counted["choices"] == 7 * 32
    assert counted["resident_model_bytes"] == 2 * ARCHITECTURES["7B"].weights
    # Per block: the inputs of attention, of its output and of the MLP, then of the down projection.
    assert counted["statistics_bytes"] == 32 * 4 * (3 * 4096**2 + 11008**2)
    # 2 + 3 + 4 + 6 + 8 bits and, of each group of 128, at least a two-byte scale per option.
    bits = counted["bank_bytes"] * 8 / ARCHITECTURES["7B"].searched_weights
    assert 23 + 5 * 16 / 128 <= bits < 24.5
    assert counted["gpus_per_worker"] == 1
    assert counted["prefix_bytes_of_a_trial"] == 32 * counted["prefix_bytes_per_block"]


def test_more_work_takes_longer_and_more_gpus_less():
    small, large = (preparation(ARCHITECTURES[n], LAWS, GPU) for n in ("7B", "70B"))
    assert all(small[step]["gpu_hours"] < large[step]["gpu_hours"] for step in small)
    one, three = (trial_seconds(ARCHITECTURES["70B"], GPU, n)["all"] for n in (1, 3))
    assert one == pytest.approx(3 * three, rel=1e-3)


def test_costs_are_measured_on_real_code():
    (row,) = budget_on_paper.measure([(16, 32)])
    assert all(row[f"{step}_seconds"] > 0 for step in ("hessian", "factor", "option"))


def test_the_document_shows_the_committed_budget():
    result = json.loads((budget_on_paper.RESULTS / "budget_on_paper.json").read_text())
    assert budget_on_paper.markdown(result) in budget_on_paper.DOCS.read_text(encoding="utf-8")
