import pytest
import torch

from autocompress.methods.floats import E2M1, E4M3, E5M2, e8m0_codes, e8m0_values

TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


@pytest.mark.parametrize(("ours", "theirs"), TORCH.items(), ids=["e4m3", "e5m2"])
def test_codes_are_the_bytes_of_torchs_formats(ours, theirs):
    table = torch.arange(256, dtype=torch.uint8).view(theirs).float()
    legal = torch.isfinite(table)
    assert torch.equal(ours.table[legal], table[legal])
    assert torch.isnan(ours.table[~legal]).all()


@pytest.mark.parametrize(("ours", "theirs"), TORCH.items(), ids=["e4m3", "e5m2"])
def test_rounding_is_that_of_torchs_casts(ours, theirs):
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(3000, generator=generator) * 10.0**e for e in range(-8, 6)])
    levels = ours.table[torch.isfinite(ours.table)].unique()
    ties = (levels[1:] + levels[:-1]) / 2
    values = torch.cat([values, levels, ties, ties.nextafter(values.max()), torch.zeros(1)])
    expected = values.clamp(-ours.top, ours.top).to(theirs)
    assert torch.equal(ours.nearest(values), expected.float())
    positive_zero = torch.where(expected.float() == 0, 0, expected.view(torch.uint8))
    assert torch.equal(ours.codes(values), positive_zero)


def test_e2m1_has_the_sixteen_codes_of_the_specification():
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert E2M1.bits == 4
    assert torch.equal(E2M1.table, torch.cat([sizes, -sizes]))


def test_e2m1_ties_go_to_the_even_mantissa_and_large_values_saturate():
    scaled = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e30, -2.5, -0.1])
    expected = torch.tensor([0, 1, 1, 2, 2, 4, 4, 6, 6, -2, 0])
    assert torch.equal(E2M1.nearest(scaled), expected.float())
    assert torch.equal(E2M1.values(E2M1.codes(scaled)), expected.float())


def test_rounding_does_not_write_its_input():
    scaled = torch.tensor([0.3, 9.0])
    E2M1.nearest(scaled)
    E2M1.codes(scaled)
    assert torch.equal(scaled, torch.tensor([0.3, 9.0]))


def test_e8m0_is_a_biased_exponent():
    codes = torch.arange(1, 255, dtype=torch.uint8)
    powers = e8m0_values(codes)
    assert torch.equal(powers.double(), torch.exp2(codes.double() - 127))
    assert torch.equal(e8m0_codes(powers), codes)
