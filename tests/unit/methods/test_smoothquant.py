"""SmoothQuant: against its equation entry by entry, and where both sides are rounded."""

import pytest
import torch

from autocompress.core.scheme import Scheme, Stage
from autocompress.methods import METHODS, LayerProblem, LayerStatistics, compress, input_map
from autocompress.methods.smoothquant import smoothing_scales
from autocompress.testing.method_contract import example_layer

SMOOTH = METHODS["smoothquant"]
OPTIONS = SMOOTH.read_options(Stage("smoothquant"))


def outlier_layer(o=48, d=64, n=2048):
    """A weight, inputs (n, d) of which four are loud, and their statistics."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(o, d, generator=generator) * 0.05
    inputs = torch.randn(n, d, generator=generator)
    inputs[:, 7::16] *= 60
    return weight, inputs, LayerStatistics(inputs.T @ inputs / n, n, "outliers")


def naive_scales(weight, hessian, alpha):
    found = []
    for j in range(weight.shape[1]):
        loud = float(hessian[j, j].sqrt())
        reach = max(abs(float(w)) for w in weight[:, j])
        found.append(loud**alpha / reach ** (1 - alpha))
    return torch.tensor(found) / (min(found) * max(found)) ** 0.5


def output_error(text):
    """Mean squared error of the outputs, inputs rounded as the scheme says."""
    weight, inputs, statistics = outlier_layer()
    compressed = compress(weight, Scheme.parse(text), statistics)
    mapped = input_map(compressed.tensors, compressed.scheme)
    outputs = mapped(inputs) @ compressed.to_dense().T
    return float((outputs - inputs @ weight.T).square().mean())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_scales_are_those_of_the_equation(alpha):
    weight, _, statistics = outlier_layer()
    scales = smoothing_scales(weight, statistics.hessian, alpha)
    expected = naive_scales(weight, statistics.hessian, alpha)
    torch.testing.assert_close(scales.float(), expected, rtol=2e-3, atol=0)
    assert float(scales.float().min() * scales.float().max()) == pytest.approx(1, rel=2e-3)


def test_half_way_inputs_and_columns_of_weights_reach_alike():
    weight, _, statistics = outlier_layer()
    problem = LayerProblem(weight, statistics)
    scales = smoothing_scales(weight, statistics.hessian, 0.5)
    moved = SMOOTH.apply(problem, {"scales": scales}, OPTIONS)
    ratio = moved.hessian.diagonal().sqrt() / moved.weight.abs().amax(0)
    assert float(ratio.max() / ratio.min()) < 1.01
    before = statistics.hessian.diagonal().sqrt() / weight.abs().amax(0)
    assert float(before.max() / before.min()) > 30


@pytest.mark.parametrize("bits", [8, 6])
def test_it_helps_where_loud_inputs_meet_one_scale_per_token(bits):
    rest = f"rtn(bits=8,group_size=0)+int_inputs(bits={bits})"
    assert output_error(f"smoothquant+{rest}") < 0.4 * output_error(rest)


def test_it_can_be_undone_and_outputs_stay():
    layer = example_layer(36, 90)
    inputs = torch.randn(12, 90)
    problem = LayerProblem(layer.weight, layer.statistics)
    stored, notes = SMOOTH.fit(problem, OPTIONS, lambda _: layer.weight)
    moved = SMOOTH.apply(problem, stored, OPTIONS)
    outputs = SMOOTH.inputs(inputs, stored, OPTIONS) @ moved.weight.T
    torch.testing.assert_close(outputs, inputs @ layer.weight.T, rtol=0, atol=1e-5)
    back = SMOOTH.inputs_back(SMOOTH.inputs(inputs, stored, OPTIONS), stored, OPTIONS)
    torch.testing.assert_close(back, inputs, rtol=1e-6, atol=0)
    torch.testing.assert_close(SMOOTH.undo(moved.weight, stored, OPTIONS), layer.weight)
    assert notes == ()


def test_without_statistics_nothing_is_scaled_and_it_says_so():
    weight, none = torch.randn(8, 24), LayerStatistics.none()
    moved = compress(weight, Scheme.parse("smoothquant+rtn(bits=3)"), none)
    plain = compress(weight, Scheme.parse("rtn(bits=3)"), none)
    assert torch.equal(moved.to_dense(), plain.to_dense())
    assert moved.notes == ("smoothquant scaled nothing: the layer has no calibration statistics",)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_inputs_dead_columns_and_a_dead_layer_are_scaled_finitely(alpha):
    weight = torch.randn(8, 16)
    weight[:, 2] = 0
    hessian = torch.eye(16) * 1e6
    hessian[5, 5] = 0
    text = f"smoothquant(alpha={alpha})+rtn(bits=8)"
    for one, other in ((weight, hessian), (weight, hessian * 0), (weight * 0, hessian)):
        statistics = LayerStatistics(other, 64, "")
        compressed = compress(one, Scheme.parse(text), statistics)
        assert bool(compressed.tensors["t.scales"].isfinite().all())
        live = torch.arange(16) != 5  # what is never read may be lost
        torch.testing.assert_close(compressed.to_dense()[:, live], one[:, live], rtol=0, atol=0.1)
