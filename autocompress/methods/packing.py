"""Bit packing: n codes of b bits in ceil(n / 8) * b bytes, for b = 1..8.

Eight codes make a chunk of b bytes, a little-endian integer with code i at bit ``i * b``. Packing
moves all eight codes of a chunk at once inside one 64-bit integer: neighbouring lanes of 8, then
16, then 32 bits are merged. Masks are codes of one bit, ``True`` = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.core.errors import SchemeError

_CHUNK = 8
_CHUNKS_AT_ONCE = 1 << 15  # temporaries of 256 KiB stay in the cache


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that `pack` needs for `n` codes of `bits` bits."""
    return -(-n // _CHUNK) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack flat uint8 codes below ``2**bits`` into uint8 bytes of shape (packed_bytes(n, bits),).

    Codes that do not fill the last chunk are followed by zeros.

    Raises:
        SchemeError: `bits` is not in 1..8.
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    missing = -flat.numel() % _CHUNK
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    if bits == 8:
        return flat.clone() if flat.data_ptr() == codes.data_ptr() else flat.contiguous()
    words = _aligned(flat).view(torch.int64)
    for lane in (8, 16, 32):
        low, used = _lanes(2 * lane, lane), lane // 8 * bits
        words = (words & low) | ((words >> (lane - used)) & (low << used))
    return words.view(torch.uint8).view(-1, 8)[:, :bits].contiguous().view(-1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes, uint8 of shape (n,); the inverse of `pack`.

    Raises:
        SchemeError: `bits` is not in 1..8, or the length of `packed` does not fit `n`.
    """
    _check_bits(bits)
    if packed.numel() != packed_bytes(n, bits):
        raise SchemeError(
            f"{n} codes of {bits} bits are packed in {packed_bytes(n, bits)} bytes, "
            f"but got {packed.numel()}."
        )
    if bits == 8:
        return packed[:n]
    n_chunks = packed.numel() // bits
    words = torch.empty(n_chunks, dtype=torch.int64, device=packed.device)
    for start in range(0, n_chunks, _CHUNKS_AT_ONCE):
        stop = min(start + _CHUNKS_AT_ONCE, n_chunks)
        words[start:stop] = _spread(_chunks(packed[start * bits : stop * bits], bits), bits)
    return words.view(torch.uint8)[:n]


def unpack_some(packed: Tensor, bits: int, places: Tensor) -> Tensor:
    """The codes at `places` (any shape, int64), uint8 of that shape; equal to ``unpack()[places]``.

    Raises:
        SchemeError: `bits` is not in 1..8.
    """
    _check_bits(bits)
    first = places * bits
    byte, shift = first >> 3, first & 7
    found = packed[byte].int() >> shift
    # A code that ends in the next byte: where none does, that byte may lie behind the last.
    rest = packed[(byte + 1).clamp_(max=max(packed.numel() - 1, 0))].int() << (8 - shift)
    return ((found | rest) & ((1 << bits) - 1)).to(torch.uint8)


def _spread(words: Tensor, bits: int) -> Tensor:
    """Each code of a chunk to a byte of its own: halve the lanes three times."""
    for lane in (32, 16, 8):
        used = lane // 8 * bits
        low = _lanes(2 * lane, used)
        words = (words & low) | ((words & (low << used)) << (lane - used))
    return words


def _chunks(packed: Tensor, bits: int) -> Tensor:
    """Each chunk of `bits` bytes as a 64-bit integer."""
    if bits == 1:
        return packed.to(torch.int64)
    if bits == 4:
        return _aligned(packed).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    words = packed.new_zeros(packed.numel() // bits, 8)
    words[:, :bits] = packed.view(-1, bits)
    return words.view(torch.int64).view(-1)


def _aligned(flat: Tensor) -> Tensor:
    """`flat`, copied if it does not start where a 64-bit integer may (a slice, a mapped file)."""
    is_aligned = flat.is_contiguous() and flat.storage_offset() % 8 == 0
    return flat if is_aligned else flat.clone(memory_format=torch.contiguous_format)


def _lanes(stride: int, width: int) -> int:
    """`width` ones in every `stride` bits of 64, without the sign bit's trouble (width < 64)."""
    pattern = sum(((1 << width) - 1) << start for start in range(0, 64, stride))
    return pattern - (1 << 64) if pattern >> 63 else pattern


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise SchemeError(f"Codes have 1 to 8 bits, but got {bits}.")
