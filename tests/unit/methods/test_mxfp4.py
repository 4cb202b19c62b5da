import math

import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress
from autocompress.testing.method_contract import example_layer

NONE = LayerStatistics.none()
SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(weight, statistics=NONE):
    return compress(weight, Scheme.parse("mxfp4"), statistics)


def read(tensors, shape):
    """As the specification describes: nibbles, the earlier weight in the lower half."""
    packed = tensors["packed"].tolist()
    values = torch.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            place = i * shape[1] + j
            nibble = packed[place // 2] >> (4 * (place % 2)) & 15
            scale = 2.0 ** (int(tensors["scales"][i, j // 32]) - 127)
            values[i, j] = (-1) ** (nibble >> 3) * SIZES[nibble & 7] * scale
    return values


def naive_exponent(block, importance):
    """Of the exponent of the specification and its neighbours the one of least error."""
    usual = math.floor(math.log2(block.abs().max().item())) - 2
    errors = {}
    for exponent in (usual, usual + 1, usual - 1):
        scale, error = 2.0**exponent, 0.0
        for w, h in zip(block.tolist(), importance.tolist(), strict=True):
            nearest = min(abs(abs(w) - size * scale) for size in SIZES)
            error += h * nearest**2
        errors[exponent] = error
    return min(errors, key=errors.get)


def test_a_reader_of_the_specification_gets_the_same_matrix():
    layer = example_layer(12, 90)
    compressed = mxfp4(layer.weight, layer.statistics)
    assert torch.equal(read(compressed.tensors, (12, 90)), compressed.to_dense())


def test_scales_are_the_best_of_three_powers_of_two():
    layer = example_layer(12, 90)
    importance = LayerProblem(layer.weight, layer.statistics).importance
    scales = mxfp4(layer.weight, layer.statistics).tensors["scales"]
    for i in range(12):
        for b, start in enumerate(range(0, 90, 32)):
            part = slice(start, start + 32)
            expected = naive_exponent(layer.weight[i, part], importance[part])
            assert scales[i, b] == expected + 127


def test_choosing_the_scale_beats_the_specifications_rule():
    layer = example_layer(40, 64)
    problem = LayerProblem(layer.weight, layer.statistics)
    blocks = layer.weight.view(40, 2, 32)
    scales = torch.exp2(blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)
    sizes = torch.tensor(SIZES)
    places = ((blocks / scales).abs()[..., None] - sizes).abs().argmin(-1)
    plain = (sizes[places] * blocks.sign() * scales).view(40, 64)
    chosen = mxfp4(layer.weight, layer.statistics).to_dense()
    assert problem.loss(chosen) < problem.loss(plain)


def test_bits_per_weight():
    stored = mxfp4(torch.randn(64, 96)).tensors
    assert sum(t.nbytes for t in stored.values()) * 8 / (64 * 96) == 4 + 8 / 32


def test_extreme_exponents_stay_inside_e8m0():
    sizes = torch.tensor([0.0, 1e-44, 1e-37, 1.0, 1e37, 3e38])[:, None]
    compressed = mxfp4(sizes * torch.ones(6, 32))
    assert all(1 <= code <= 254 for code in compressed.tensors["scales"].flatten().tolist())
    assert torch.isfinite(compressed.to_dense()).all()
    # A quarter is what saturation at 6 costs where squares of errors leave float32.
    assert torch.allclose(compressed.to_dense()[2:], sizes[2:].expand(4, 32), rtol=0.26, atol=0)
