import pytest
import torch

from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress, hqq
from autocompress.methods.hqq import HQQOptions, fit, nearest_codes
from autocompress.testing.method_contract import example_layer


def naive_fit(weights, options):
    """One group, as published, one step after the other; zero points and errors of every step."""
    low, high = min(weights), max(weights)
    scale = torch.tensor((high - low) / options.top).half().item()
    zero = torch.tensor(-low / scale).half().item()
    beta, found = 10.0, []
    for _ in range(options.iterations + 1):
        codes = [min(max(round(w / scale + zero), 0), options.top) for w in weights]
        errors = [w - (q - zero) * scale for w, q in zip(weights, codes, strict=True)]
        found.append((sum(map(abs, errors)) / len(errors), zero))
        shrunk = [
            0.0 if e == 0 else (1 if e > 0 else -1) * max(abs(e) - abs(e) ** -0.3 / beta, 0.0)
            for e in errors
        ]
        terms = [q - (w - e) / scale for q, w, e in zip(codes, weights, shrunk, strict=True)]
        zero = torch.tensor(sum(terms) / len(terms)).half().item()
        beta *= 1.01
    return scale, min(found)[1], found


def heavy_tailed(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()


def mean_error(block, options):
    scale, zero = fit(block, options)
    codes = nearest_codes(block, scale, zero, options.top)
    return (block - (codes - zero.float()[..., None]) * scale.float()[..., None]).abs().mean(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_match_the_published_iteration(bits):
    options = HQQOptions(bits, 0)
    block = heavy_tailed(6, 4, 32)
    scales, zeros = fit(block, options)
    for i in range(6):
        for k in range(4):
            scale, zero, found = naive_fit(block[i, k].tolist(), options)
            assert float(scales[i, k]) == scale
            # Float32 may take another of the steps only where two are as good.
            taken = min(found, key=lambda pair: abs(pair[1] - float(zeros[i, k])))
            assert abs(taken[1] - float(zeros[i, k])) <= 2e-3 * (1 + abs(zero))
            assert taken[0] <= min(found)[0] * (1 + 1e-4)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 0), (3, 8), (4, 13), (8, 5)])
def test_stored_tensors_mean_what_a_naive_decoder_reads(bits, group_size):
    weight = heavy_tailed(7, 30)
    scheme = Scheme.parse(f"hqq(bits={bits},group_size={group_size})")
    compressed = compress(weight, scheme, LayerStatistics.none())
    scales, zeros = compressed.tensors["scales"], compressed.tensors["zeros"]
    dense, width = compressed.to_dense(), group_size or 30
    for i in range(7):
        for j in range(30):
            scale, zero = float(scales[i, j // width]), float(zeros[i, j // width])
            code = min(max(round(float(weight[i, j]) / scale + zero), 0), 2**bits - 1)
            assert float(dense[i, j]) == pytest.approx((code - zero) * scale, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitting_lowers_the_error_of_heavy_tailed_groups_and_raises_none(bits):
    block = heavy_tailed(16, 8, 64)
    plain = mean_error(block, HQQOptions(bits, 0, iterations=0))
    fitted = mean_error(block, HQQOptions(bits, 0, iterations=20))
    assert (fitted <= plain).all()
    assert fitted.mean() < 0.95 * plain.mean()


def test_without_iterations_the_range_is_covered():
    block = heavy_tailed(4, 8, 64)
    scale, zero = fit(block, HQQOptions(4, 0, iterations=0))
    codes = nearest_codes(block, scale, zero, 15)
    errors = (block - (codes - zero.float()[..., None]) * scale.float()[..., None]).abs()
    assert (errors <= 0.51 * scale.float()[..., None]).all()


@pytest.mark.parametrize("offset", [0.0, 0.3, -7.0, 3000.0])
def test_groups_that_are_flat_or_far_from_zero_keep_their_level(offset):
    block = offset + 1e-3 * torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    for weights in (block, torch.full_like(block, offset)):
        error = mean_error(weights, HQQOptions(4, 0))
        assert (error <= 1e-3 * abs(offset) + 2e-4).all()


def test_statistics_change_nothing():
    layer = example_layer(36, 90)
    with_, without = (
        compress(layer.weight, Scheme.parse("hqq(bits=3)"), statistics).tensors
        for statistics in (layer.statistics, LayerStatistics.none())
    )
    assert all(torch.equal(with_[name], without[name]) for name in with_)


def test_a_calibrated_clip_beats_it_where_inputs_are_loud():
    layer = example_layer(64, 96)
    problem = LayerProblem(layer.weight, layer.statistics)
    losses = [
        problem.loss(layer.compress(text).to_dense())
        for text in (
            "rtn(bits=3,group_size=48,symmetric=false)",
            "hqq(bits=3,group_size=48)",
            "hqq(bits=3,group_size=48,iterations=0)",
        )
    ]
    assert losses == sorted(losses)


def test_it_stores_two_numbers_of_sixteen_bits_per_group():
    compressed = compress(torch.randn(16, 128), Scheme.parse("hqq(bits=3)"), LayerStatistics.none())
    n_bytes = sum(tensor.nbytes for tensor in compressed.tensors.values())
    assert 8 * n_bytes / (16 * 128) == 3 + 32 / 64


def test_it_cannot_follow_pruning():
    with pytest.raises(SchemeError, match="no code for zero"):
        compress(torch.randn(8, 8), Scheme.parse("wanda+hqq"), LayerStatistics.none())


def test_parts_of_few_rows_give_the_same(monkeypatch):
    layer = example_layer(36, 90)
    whole = layer.compress("hqq(bits=3)").tensors
    monkeypatch.setattr(hqq, "_WEIGHTS_AT_ONCE", 5 * 90)
    parts = layer.compress("hqq(bits=3)").tensors
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
