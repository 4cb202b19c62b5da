from statistics import NormalDist

import pytest
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress, decode_rows
from autocompress.methods.nf4 import NF4_LEVELS
from autocompress.testing.method_contract import example_layer

NONE = LayerStatistics.none()


def nf4(weight, text="nf4", statistics=NONE):
    return compress(weight, Scheme.parse(text), statistics)


def test_levels_are_the_papers_quantiles():
    """Even quantiles of each side, scaled to [-1, 1].

    The outermost is 1 - (1/30 + 1/32)/2. The published levels come from float32, with seven digits
    of it.
    """
    outermost = 0.9677083

    def side(n):
        places = [outermost + (0.5 - outermost) * i / n for i in range(n)]
        return [NormalDist().inv_cdf(p) for p in places]

    levels = sorted([*side(8), 0.0, *(-q for q in side(7))])
    largest = max(levels)
    expected = [level / largest for level in levels]
    assert pytest.approx(expected, abs=1.2e-7) == NF4_LEVELS


def test_codes_count_the_levels_upwards_from_minus_one():
    weight = torch.tensor(NF4_LEVELS)[None] * torch.tensor([[2.0], [0.25]])
    compressed = nf4(weight, "nf4(group_size=16,double_quantization=false)")
    assert torch.equal(compressed.tensors["scales"], torch.tensor([[2.0], [0.25]]).half())
    packed = compressed.tensors["packed"].view(2, 8)
    assert torch.equal(packed & 15, torch.arange(0, 16, 2, dtype=torch.uint8).expand(2, 8))
    assert torch.equal(packed >> 4, torch.arange(1, 16, 2, dtype=torch.uint8).expand(2, 8))


def naive_scales(tensors):
    """Scale by scale: 8-bit float times the scale of its block, plus the mean."""
    floats = tensors["scales"].view(torch.float8_e4m3fn).float().flatten().tolist()
    blocks, mean = tensors["block_scales"].tolist(), tensors["mean_scale"].item()
    values = [f * blocks[k // 256] + mean for k, f in enumerate(floats)]
    return torch.tensor(values).view(tensors["scales"].shape)


def test_double_quantization_keeps_scales_to_a_few_percent_of_their_spread():
    layer = example_layer(88, 37)
    weight = layer.weight * torch.linspace(1, 2, 88)[:, None]
    double = nf4(weight, "nf4(group_size=5)")
    plain = nf4(weight, "nf4(group_size=5,double_quantization=false)").tensors["scales"].float()
    assert double.tensors["block_scales"].shape == (3,)  # 88 * 8 groups
    found = naive_scales(double.tensors)
    assert torch.allclose(double.tensors["mean_scale"], plain.mean())
    spread = (plain - plain.mean()).abs()
    assert ((found - plain).abs() <= spread / 16 + spread.max() * 2**-9 / 448 + 1e-7).all()
    width = torch.arange(37) // 5
    ratio = double.to_dense() / found[:, width]
    levels = torch.tensor(NF4_LEVELS)
    assert ((ratio[..., None] - levels).abs().amin(-1) < 1e-5).all()


def test_double_quantization_costs_little():
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    problem = LayerProblem(weight, NONE)
    double, plain = (
        problem.loss(nf4(weight, t).to_dense()) for t in ("nf4", "nf4(double_quantization=false)")
    )
    assert double < 1.02 * plain


def test_requantizing_under_double_quantization_changes_only_scales_a_little():
    layer = example_layer(36, 90)
    once = nf4(layer.weight, "nf4", layer.statistics).to_dense()
    twice = nf4(once, "nf4", layer.statistics).to_dense()
    assert (twice - once).abs().max() < 0.02 * once.abs().max()
    codes = [nf4(w, "nf4", layer.statistics).tensors["packed"] for w in (layer.weight, once)]
    assert (codes[0] == codes[1]).float().mean() > 0.99


def test_choosing_the_scale_beats_the_largest_weight():
    layer = example_layer(40, 64)
    problem = LayerProblem(layer.weight, layer.statistics)
    scales = layer.weight.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS)
    plain = levels[((layer.weight / scales)[..., None] - levels).abs().argmin(-1)] * scales
    text = "nf4(double_quantization=false)"
    chosen = nf4(layer.weight, text, layer.statistics).to_dense()
    assert problem.loss(chosen) < 0.9 * problem.loss(plain)


def test_lookups_read_the_scales_of_their_rows():
    layer = example_layer(88, 37)
    weight = layer.weight * torch.logspace(-1, 1, 88)[:, None]
    compressed = nf4(weight, "nf4(group_size=5)")
    rows = torch.tensor([87, 0, 40, 40])
    found = decode_rows(
        compressed.tensors, compressed.scheme, compressed.shape, rows, torch.float32
    )
    assert torch.equal(found, compressed.to_dense()[rows])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("group_size=64", 4 + 8 / 64 + 32 / (64 * 256) + 32 / (256 * 128)),
        ("group_size=64,double_quantization=false", 4 + 16 / 64),
        ("group_size=32", 4 + 8 / 32 + 32 / (32 * 256) + 32 / (256 * 128)),
    ],
)
def test_bits_per_weight(options, expected):
    stored = nf4(torch.randn(256, 128), f"nf4({options})").tensors
    assert sum(t.nbytes for t in stored.values()) * 8 / (256 * 128) == expected
