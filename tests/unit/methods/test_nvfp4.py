import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress
from autocompress.methods.floats import E2M1
from autocompress.testing.method_contract import example_layer

NONE = LayerStatistics.none()
SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nvfp4(weight, statistics=NONE):
    return compress(weight, Scheme.parse("nvfp4"), statistics)


def read(tensors, shape):
    """Nibbles, the earlier weight in the lower half, times E4M3 times float32."""
    packed = tensors["packed"].tolist()
    scales = tensors["scales"].view(torch.float8_e4m3fn).float() * tensors["matrix_scale"]
    values = torch.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            place = i * shape[1] + j
            nibble = packed[place // 2] >> (4 * (place % 2)) & 15
            values[i, j] = (-1) ** (nibble >> 3) * SIZES[nibble & 7] * scales[i, j // 16].item()
    return values


def test_a_reader_of_the_format_gets_the_same_matrix():
    layer = example_layer(12, 90)
    compressed = nvfp4(layer.weight, layer.statistics)
    assert torch.equal(read(compressed.tensors, (12, 90)), compressed.to_dense())


def test_the_largest_weight_of_the_matrix_is_six_times_the_largest_scale():
    layer = example_layer(36, 90)
    compressed = nvfp4(layer.weight, layer.statistics)
    scales = compressed.tensors["scales"].view(torch.float8_e4m3fn).float()
    assert scales.max() == 448
    assert compressed.tensors["matrix_scale"].dtype == torch.float32
    largest = layer.weight.abs().max()
    assert compressed.to_dense().abs().max() == 6 * 448 * compressed.tensors["matrix_scale"]
    assert torch.allclose(compressed.to_dense().abs().max(), largest, rtol=2**-15)


def test_the_order_of_multiplication_does_not_matter():
    layer = example_layer(40, 64)
    stored = nvfp4(layer.weight, layer.statistics).tensors
    scales = stored["scales"].view(torch.float8_e4m3fn).float()[..., None]
    levels = E2M1.table.expand(40, 4, 16)
    assert torch.equal(levels * scales * stored["matrix_scale"],
                       levels * (scales * stored["matrix_scale"]))  # fmt: skip


def test_scales_are_the_best_of_the_neighbours_of_both_usual_ones():
    layer = example_layer(12, 90)
    importance = LayerProblem(layer.weight, layer.statistics).importance
    stored = nvfp4(layer.weight, layer.statistics).tensors
    unit = stored["matrix_scale"].item()
    legal = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    largest = layer.weight.abs().max()
    for i in range(12):
        for b, start in enumerate(range(0, 90, 16)):
            block = layer.weight[i, start : start + 16]
            if block.abs().max() == largest:
                assert stored["scales"][i, b] == 126
                continue
            errors = {}
            for goal in (6, 4):
                usual = (legal - block.abs().max() / unit / goal).abs().argmin().item()
                for code in (usual, min(usual + 1, 126), usual - 1):
                    scale = legal[code] * unit
                    gaps = (block.abs()[:, None] - torch.tensor(SIZES) * scale).abs().amin(1)
                    errors[code] = (gaps.square() * importance[start : start + 16]).sum().item()
            assert errors[int(stored["scales"][i, b])] <= min(errors.values()) * (1 + 1e-5)


def test_choosing_the_scales_beats_six_for_every_block():
    layer = example_layer(40, 64)
    problem = LayerProblem(layer.weight, layer.statistics)
    blocks = layer.weight.view(40, 4, 16)
    unit = layer.weight.abs().max() / (6 * 448)
    scales = (blocks.abs().amax(-1, keepdim=True) / 6 / unit).to(torch.float8_e4m3fn).float() * unit
    plain = (E2M1.nearest(blocks / scales) * scales).view(40, 64)
    chosen = nvfp4(layer.weight, layer.statistics).to_dense()
    assert problem.loss(chosen) < 0.8 * problem.loss(plain)


def test_bits_per_weight():
    stored = nvfp4(torch.randn(64, 96)).tensors
    assert sum(t.nbytes for t in stored.values()) * 8 / (64 * 96) == 4 + 8 / 16 + 32 / (64 * 96)
