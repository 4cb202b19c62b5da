import itertools

import pytest
import torch
from layers import loss_of

from autocompress.core.errors import ModelError, SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import (
    LayerProblem,
    LayerStatistics,
    canonical,
    check,
    compress,
    decode,
    footprint,
)
from autocompress.methods.packing import pack
from autocompress.methods.subgroup import WIDTHS, BandCoding, SubgroupOptions, allocate
from autocompress.testing.method_contract import example_layer


def naive_allocate(losses, total):
    """Every way to give widths, one after the other."""
    best = None
    for levels in itertools.product(range(len(WIDTHS)), repeat=len(losses)):
        widths = tuple(WIDTHS[level] for level in levels)
        loss = sum(float(losses[band, level]) for band, level in enumerate(levels))
        if sum(widths) == total and (best is None or loss < best[0]):
            best = loss, widths
    return best[1]


def naive_pack(codes, widths, n_bands):
    """Band by band, each packed by itself."""
    bands = codes[:, 1:].reshape(n_bands, -1)
    order = sorted(range(n_bands), key=lambda band: -widths[band])
    parts = [pack(bands[band], widths[band]) for band in order if widths[band]]
    return torch.cat([torch.tensor(widths, dtype=torch.uint8), *parts])


def coded_rows(widths, o, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    by_row = torch.tensor(widths).repeat_interleave(o // len(widths))[:, None]
    codes = torch.randint(0, 256, (o, d), generator=generator) % (2**by_row)
    return torch.cat([by_row, codes], 1).to(torch.uint8)


def uneven_problem(o=64, d=96):
    """Rows of which the first say little and the last much, in steps of four."""
    layer = example_layer(o, d)
    sizes = torch.linspace(-4, 2, o // 4).exp().repeat_interleave(4)
    return LayerProblem(layer.weight * sizes[:, None], layer.statistics)


@pytest.mark.parametrize("total", [2, 6, 12, 20, 26, 36, 40])
def test_the_allocation_is_the_best_of_all(total):
    losses = torch.rand(5, 4, generator=torch.Generator().manual_seed(total), dtype=torch.float64)
    losses = losses.sort(1, descending=True).values
    assert allocate(losses, total) == naive_allocate(losses, total)


def test_every_average_asks_for_a_sum_that_widths_can_have():
    for n_bands in range(2, 5):
        sums = {sum(widths) for widths in itertools.product(WIDTHS, repeat=n_bands)}
        for step in range(1, 101):
            average = 2 / n_bands + (8 - 2 / n_bands) * step / 100
            options = SubgroupOptions(bands=n_bands, average=average)
            closest = min(abs(total - average * n_bands) for total in sums - {0})
            assert options.total in sums
            assert abs(options.total - average * n_bands) <= closest + 2


@pytest.mark.parametrize("widths", [(4, 2, 0, 4), (8, 0, 2, 2, 8, 4), (0, 2), (8, 8)])
@pytest.mark.parametrize("d", [16, 7])
def test_packing_matches_the_naive_one_and_comes_back(widths, d):
    o = 3 * len(widths)
    codes = coded_rows(widths, o, d)
    coding = BandCoding(SubgroupOptions("-".join(map(str, widths))))
    packed = coding.pack(codes)
    assert torch.equal(packed, naive_pack(codes, list(widths), len(widths)))
    assert packed.numel() == coding.code_bytes((o, d))
    assert torch.equal(coding.unpack(packed, (o, d)), codes)
    rows = torch.tensor([o - 1, 0, 0, 2])
    assert torch.equal(coding.unpack_rows(packed, (o, d), rows), codes[rows])


@pytest.mark.parametrize("text", ["subgroup(bits=4-2-0-8,group_size=32)", "subgroup(bands=4)"])
def test_each_band_is_what_gptq_makes_of_it_alone(text):
    problem = uneven_problem(64, 96)
    compressed = compress(problem.weight, Scheme.parse(text), problem.statistics)
    widths = compressed.tensors["packed"][:4].tolist()
    group_size = 32 if "32" in text else 128
    assert len(set(widths)) > 1
    for width, weight, found in zip(
        widths, problem.weight.split(16), compressed.to_dense().split(16), strict=True
    ):
        expected = torch.zeros_like(weight)
        if width:
            scheme = Scheme.parse(f"gptq(bits={width},group_size={group_size})")
            expected = compress(weight, scheme, problem.statistics).to_dense()
        # A weight within float32 rounding of a boundary may fall to either side.
        assert (found != expected).float().mean() < 0.02


def test_equal_widths_are_plain_gptq():
    problem = uneven_problem()
    dense = [
        compress(problem.weight, Scheme.parse(text), problem.statistics).to_dense()
        for text in ("subgroup(bits=4-4-4-4,group_size=32)", "gptq(bits=4,group_size=32)")
    ]
    assert torch.equal(*dense)


@pytest.mark.parametrize("bits", [2, 4])
def test_mixed_widths_beat_one_width_of_the_same_bits(bits):
    problem = uneven_problem()
    mixed = loss_of(problem, f"subgroup(bands=16,average={bits}.0)")
    assert mixed < 0.8 * loss_of(problem, f"gptq(bits={bits})")


def test_finer_bands_lose_less_and_the_gain_saturates():
    problem = uneven_problem()
    losses = [loss_of(problem, f"subgroup(bands={n},average=2.0)") for n in (2, 4, 8, 16, 32)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[3] > 10 * (losses[3] - losses[4])


def test_what_is_stored_follows_from_the_sum_of_the_widths():
    problem, n_weights = uneven_problem(64, 64), 64 * 64
    for text, average in (
        ("subgroup(bands=8,group_size=32)", 3.0),
        ("subgroup(bands=8,average=2.5,group_size=32)", 2.5),
        ("subgroup(bits=4-2-0-4-8-0-0-2,group_size=32)", 2.5),
    ):
        tensors = compress(problem.weight, Scheme.parse(text), problem.statistics).tensors
        n_bits = 8 * sum(tensor.nbytes for tensor in tensors.values())
        assert n_bits / n_weights == average + 16 / 32 + 8 * 8 / n_weights
        assert sum(tensors["packed"][:8].tolist()) == 8 * average


def test_widths_that_are_given_override_bands_and_average():
    texts = ("subgroup(bits=4-2-0-4)", "subgroup(bits=4-2-0-4,bands=8,average=6.0)")
    short, long = (canonical(Scheme.parse(text)) for text in texts)
    assert short == long
    assert dict(short.stages[0].options) == {
        "bits": "4-2-0-4",
        "bands": 4,
        "average": 2.5,
        "group_size": 128,
    }


@pytest.mark.parametrize("bits", ["4-3", "4--2", "", "0-0", "4-2-", "04-2"])
def test_malformed_widths_are_refused(bits):
    with pytest.raises(SchemeError, match="widths of the bands"):
        SubgroupOptions(bits)


def test_bands_that_do_not_divide_the_outputs_are_refused_with_the_nearest_that_do():
    layer = example_layer(36, 90)
    with pytest.raises(SchemeError, match=r"divide the 36 outputs.*nearest legal value is 9\."):
        check(layer.spec, Scheme.parse("subgroup"))


def test_without_statistics_bands_are_rounded_and_chosen_by_plain_error():
    problem = uneven_problem()
    scheme = Scheme.parse("subgroup(bands=16,average=2.0)")
    compressed = compress(problem.weight, scheme, LayerStatistics.none())
    assert compressed.notes == (
        "subgroup rounded to nearest: the layer has no calibration statistics",
    )
    widths = compressed.tensors["packed"][:16].tolist()
    assert widths == sorted(widths)  # the loudest rows come last
    assert len(set(widths)) > 1
    n_bytes = sum(tensor.nbytes for tensor in compressed.tensors.values())
    assert n_bytes == footprint(example_layer(64, 96).spec, scheme).storage_bytes


def test_damaged_widths_are_refused():
    compressed = example_layer(40, 64).compress("subgroup(bands=4,average=4.0)")
    tensors = {**compressed.tensors, "packed": compressed.tensors["packed"].clone()}
    tensors["packed"][0] = 3
    with pytest.raises(ModelError, match=r"among .* that add up to 16, but start with \[3"):
        decode(tensors, compressed.scheme, compressed.shape, torch.float32)
