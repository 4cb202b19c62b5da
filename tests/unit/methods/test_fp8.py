import pytest
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress
from autocompress.testing.method_contract import example_layer

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NONE = LayerStatistics.none()


def tensors(weight, text, statistics=NONE):
    return compress(weight, Scheme.parse(text), statistics).tensors


@pytest.mark.parametrize("name", TORCH)
def test_torch_reads_the_stored_bytes(name):
    layer = example_layer(36, 90)
    text = f"fp8(format={name},group_size=0)"
    compressed = compress(layer.weight, Scheme.parse(text), layer.statistics)
    codes = compressed.tensors["packed"].view(TORCH[name]).view(36, 90)
    assert torch.equal(compressed.to_dense(), codes.float() * compressed.tensors["scales"].float())


@pytest.mark.parametrize("name", TORCH)
def test_codes_are_torchs_casts_at_the_chosen_scale(name):
    weight = example_layer(36, 90).weight
    stored = tensors(weight, f"fp8(format={name},group_size=0)")
    cast = (weight / stored["scales"].float()).to(TORCH[name])
    assert torch.equal(stored["packed"].view(TORCH[name]).float(), cast.float().view(-1))


@pytest.mark.parametrize("name", TORCH)
def test_no_scale_that_puts_the_largest_weight_on_a_number_is_better(name):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 40, generator=generator) * 0.1
    energies = torch.rand(40, generator=generator) + 0.1
    problem = LayerProblem(weight, LayerStatistics(torch.diag(energies), 10**6, "x"))
    stored = tensors(weight, f"fp8(format={name},group_size=0)", problem.statistics)
    numbers = torch.arange(256, dtype=torch.uint8).view(TORCH[name]).float().tolist()
    for i in range(6):
        errors = {}
        for number in numbers:
            if 240 <= number <= 448:
                scale = (weight[i].abs().max() / number).half().float()
                values = (weight[i] / scale).clamp(-448, 448).to(TORCH[name]).float() * scale
                error = ((values - weight[i]).square() * problem.importance).sum()
                errors[scale.item()] = error.item()
        chosen = errors[stored["scales"][i, 0].item()]
        assert chosen <= min(errors.values()) * (1 + 1e-5)


def test_choosing_the_number_of_the_largest_weight_beats_always_taking_the_top():
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    problem = LayerProblem(weight, NONE)
    top = (weight.abs().amax(1, keepdim=True) / 448).half().float()
    plain = (weight / top).clamp(-448, 448).to(torch.float8_e4m3fn).float() * top
    chosen = compress(weight, Scheme.parse("fp8"), NONE).to_dense()
    assert problem.loss(chosen) < 0.95 * problem.loss(plain)


@pytest.mark.parametrize(
    ("group_size", "expected"), [(0, 8 + 16 / 128), (32, 8.5), (48, 8 + 3 / 8)]
)
def test_bits_per_weight(group_size, expected):
    stored = tensors(torch.randn(64, 128), f"fp8(group_size={group_size})")
    assert sum(t.nbytes for t in stored.values()) * 8 / (64 * 128) == expected


def test_e4m3_loses_less_than_e5m2_and_more_than_nothing():
    layer = example_layer(36, 90)
    problem = LayerProblem(layer.weight, layer.statistics)
    fine, coarse = (
        problem.loss(compress(layer.weight, Scheme.parse(t), layer.statistics).to_dense())
        for t in ("fp8", "fp8(format=e5m2)")
    )
    assert 0 < fine < 0.5 * coarse
