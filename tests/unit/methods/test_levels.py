"""Laws of every fixed number format, each against naive references."""

import pytest
import torch

from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress
from autocompress.methods.levels import GroupOptions, ListedLevels, ScaledCoding
from autocompress.methods.schemes import plan
from autocompress.testing.method_contract import example_layer

FORMATS = (
    "fp8",
    "fp8(group_size=24)",
    "fp8(format=e5m2)",
    "fp8(format=e5m2,group_size=7)",
    "mxfp4",
    "nvfp4",
    "nf4(double_quantization=false)",
    "nf4(group_size=11,double_quantization=false)",
    "binary(group_size=12)",
    "binary(group_size=0)",
    "ternary(group_size=12)",
    "ternary(group_size=0)",
)
MASKABLE = tuple(text for text in FORMATS if not text.startswith("binary"))
NONE = LayerStatistics.none()


def dense(weight, text, statistics=NONE):
    return compress(weight, Scheme.parse(text), statistics).to_dense()


def quantized(weight, text, mask=None, statistics=NONE):
    """(coding, codes, scales per group)."""
    step = plan(Scheme.parse(text)).quantize
    found = step.method.quantize(LayerProblem(weight, statistics), mask, step.options)
    coding = step.method.coding(step.options)
    return coding, found.codes, coding.scales(found.parameters, None)


@pytest.mark.parametrize("text", FORMATS)
def test_every_weight_takes_the_level_nearest_to_it_times_its_groups_scale(text):
    weight = example_layer(9, 90).weight
    coding, codes, scales = quantized(weight, text)
    values = dense(weight, text)
    levels = [level for level in coding.levels.table.tolist() if level == level]
    width = coding.width(90)
    for i in range(9):
        for j in range(90):
            w, scale = weight[i, j].item(), scales[i, j // width].item()
            level = coding.levels.table[int(codes[i, j])].item()
            assert values[i, j].item() == torch.tensor(level * scale).item()
            least = min(abs(w - level * scale) for level in levels)
            assert abs(w - level * scale) <= least + 1e-6 * abs(w)


@pytest.mark.parametrize("text", FORMATS)
def test_a_matrix_that_the_format_holds_comes_back_exactly(text):
    layer = example_layer(36, 90)
    sizes = torch.logspace(-4, 3, 36)[:, None] * torch.logspace(-2, 2, 90)
    for weight in (layer.weight, layer.weight * sizes, layer.weight * 3e-6, layer.weight * 0):
        once = dense(weight, text, layer.statistics)
        assert torch.equal(dense(once, text, layer.statistics), once)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 1e4, 1e30])
def test_weights_of_any_size_stay_finite(text, size):
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)) * size
    values = dense(weight, text)
    assert torch.isfinite(values).all()
    assert (values.abs() <= 1.6 * weight.abs().max()).all()


@pytest.mark.parametrize("text", MASKABLE)
def test_pruned_weights_stay_zero_and_do_not_widen_the_scale(text):
    layer = example_layer(24, 96)
    weight = layer.weight.clone()
    mask = torch.rand(24, 96, generator=torch.Generator().manual_seed(1)) < 0.6
    weight[~mask] *= 1000
    coding, codes, scales = quantized(weight, text, mask, layer.statistics)
    values = coding.levels.values(codes)
    assert (values[~mask] == 0).all()
    alone = quantized(weight * mask, text, None, layer.statistics)
    assert torch.equal(scales, alone[2])


@pytest.mark.parametrize("text", FORMATS)
def test_weighting_by_the_inputs_lowers_the_loss(text):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    energies = torch.logspace(-2, 2, 128)[torch.randperm(128, generator=torch.Generator())]
    statistics = LayerStatistics(torch.diag(energies), 10**6, "x")
    problem = LayerProblem(weight, statistics)
    assert problem.loss(dense(weight, text, statistics)) < problem.loss(dense(weight, text))


@pytest.mark.parametrize("text", [t for t in FORMATS if t != "nvfp4"])
def test_the_last_group_may_be_shorter_and_stands_alone(text):
    weight = torch.randn(5, 83, generator=torch.Generator().manual_seed(3))
    coding, codes, scales = quantized(weight, text)
    start = 83 // coding.width(83) * coding.width(83) % 83
    _, tail_codes, tail_scales = quantized(weight[:, start:].contiguous(), text)
    assert torch.equal(codes[:, start:], tail_codes)
    assert torch.equal(scales[:, -1], tail_scales[:, -1])


@pytest.mark.parametrize("text", FORMATS)
def test_rows_do_not_depend_on_how_many_are_taken_at_once(text, monkeypatch):
    layer = example_layer(36, 90)
    whole = dense(layer.weight, text, layer.statistics)
    monkeypatch.setattr("autocompress.methods.levels._WEIGHTS_AT_ONCE", 200)
    assert torch.equal(dense(layer.weight, text, layer.statistics), whole)


def test_the_first_of_the_best_candidates_is_taken():
    coding = ScaledCoding(ListedLevels((-1.0, 0.0, 1.0, 2.0)), 4)
    weight = torch.tensor([[2.0, 4.0, 0.0, -2.0, 1.0]])

    def candidates(largest):
        assert torch.equal(largest, torch.tensor([[4.0, 1.0]]))
        return (torch.full_like(largest, scale) for scale in (8.0, 2.0, 1.0, 0.5))

    scales = coding.best_scales(weight, torch.ones(5), candidates)
    assert torch.equal(scales, torch.tensor([[2.0, 1.0]]))
    coded = coding.codes(weight, scales)
    assert torch.equal(coded, torch.tensor([[2, 3, 1, 0, 2]], dtype=torch.uint8))


def test_a_code_has_as_many_bits_as_its_levels_need():
    assert [ListedLevels(tuple(map(float, range(n)))).bits for n in (2, 3, 4, 5, 16)] == [
        1, 2, 2, 3, 4,
    ]  # fmt: skip


def test_a_negative_group_size_is_refused():
    with pytest.raises(SchemeError, match=r"group_size must be 0 .* got -3"):
        GroupOptions(-3)
