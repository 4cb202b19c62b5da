import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core.errors import SchemeError
from autocompress.methods.packing import pack, packed_bytes, unpack


def naive_pack(codes, bits):
    """One bit after the other, lowest first, chunks of eight codes filled with zeros."""
    padded = list(codes) + [0] * (-len(codes) % 8)
    stream = [(code >> bit) & 1 for code in padded for bit in range(bits)]
    return np.packbits(np.array(stream, dtype=np.uint8), bitorder="little")


@settings(deadline=None)
@given(data=st.data(), bits=st.integers(1, 8), length=st.integers(0, 300))
def test_packing_round_trips_and_matches_the_naive_packer(data, bits, length):
    top = (1 << bits) - 1
    codes = data.draw(st.lists(st.integers(0, top), min_size=length, max_size=length))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.numel() == packed_bytes(length, bits) == -(-length // 8) * bits
    assert packed.tolist() == naive_pack(codes, bits).tolist()
    assert unpack(packed, bits, length).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bytes_that_start_anywhere_in_memory_unpack(bits):
    codes = torch.randint(0, 1 << bits, (40,), dtype=torch.uint8)
    packed = pack(codes, bits)
    for offset in range(1, 9):
        buffer = torch.cat([packed.new_zeros(offset), packed])
        assert torch.equal(unpack(buffer[offset:], bits, 40), codes)


@pytest.mark.parametrize("bits", [3, 8])
def test_packing_reads_strided_codes_and_shares_no_memory(bits):
    codes = torch.randint(0, 8, (16, 6), dtype=torch.uint8)
    before = codes.clone()
    packed = pack(codes.T, bits)
    assert torch.equal(unpack(packed, bits, 96).view(6, 16), codes.T)
    pack(codes, bits).zero_()
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_more_codes_than_are_unpacked_at_once_round_trip(bits):
    codes = torch.randint(0, 1 << bits, ((1 << 19) + 13,), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, len(codes)), codes)


def test_a_four_bit_matrix_takes_four_bits_per_entry():
    assert packed_bytes(1024 * 1024, 4) == 1024 * 1024 // 2


@pytest.mark.parametrize("bits", [0, 9])
def test_widths_outside_one_to_eight_are_refused(bits):
    with pytest.raises(SchemeError, match=f"1 to 8 bits, but got {bits}"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)


def test_bytes_of_the_wrong_length_are_refused():
    with pytest.raises(SchemeError, match=r"9 codes of 4 bits are packed in 8 bytes, but got 4"):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, 9)
