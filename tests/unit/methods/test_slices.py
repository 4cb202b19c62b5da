"""Reading a matrix by slices of rows gives what reading it whole gives."""

import pytest
import torch

from autocompress.core import Scheme
from autocompress.core.errors import ModelError
from autocompress.methods import LayerStatistics, compress, slices
from autocompress.methods.packing import pack, unpack, unpack_some
from autocompress.methods.schemes import plan
from autocompress.methods.slices import Slices, decode_matrix

SHAPE = (52, 100)
ROWS = 24
SCHEMES = (
    "base",
    "cast(dtype=float16)",
    "magnitude(sparsity=0.7)",
    "magnitude(sparsity=0.5)+cast(dtype=bfloat16)",
    "rtn(bits=3,group_size=16)",
    "rtn(bits=5,group_size=24,symmetric=false)",
    "rtn(bits=8,group_size=0,symmetric=false)",
    "magnitude(sparsity=0.8)+rtn(bits=3,group_size=16,symmetric=false)",
    "magnitude(sparsity=0.99)+rtn(bits=4,group_size=0)",
    "subgroup(bands=4,average=4.0)",
    "nf4(group_size=16)",
    "nvfp4",
    "mxfp4",
    "fp8",
    "kmeans(bits=3)",
    "product(block=4,codewords=16)",
    "binary(group_size=8)",
    "hqq(bits=3,group_size=16)",
    "drop",
)


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 24, 24 and 4 rows."""
    for name in ("_WEIGHTS", "_WEIGHTS_TO_COPY"):
        monkeypatch.setattr(slices, name, SHAPE[1] * (ROWS + 7))
    monkeypatch.setattr(slices, "_WHOLE", 1)


def compressed(scheme: str) -> dict[str, torch.Tensor]:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) + 0.3
    weight[ROWS : 2 * ROWS] = 0  # a slice of which a mask keeps nothing
    return dict(compress(weight, Scheme.parse(scheme), LayerStatistics.none()).tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_slices_decode_to_the_whole(scheme: str, dtype: torch.dtype) -> None:
    tensors, storage = compressed(scheme), plan(Scheme.parse(scheme)).storage(SHAPE)
    whole = storage.decode(tensors)
    assert torch.equal(decode_matrix(storage, tensors, dtype), whole.to(dtype))
    if tensors:
        found = list(Slices.of(storage, tensors))
        assert [rows.start for rows, _ in found] == [0, 24, 48]
        assert torch.equal(torch.cat([values for _, values in found]), whole)


@pytest.mark.parametrize("scheme", ["rtn(bits=3,group_size=16)", SCHEMES[7]])
def test_slices_hold_the_codes_of_the_whole(scheme: str) -> None:
    tensors, storage = compressed(scheme), plan(Scheme.parse(scheme)).storage(SHAPE)
    codes, mask = storage.codes(tensors)
    for rows, some, kept in Slices.of(storage, tensors, multiple=16).coded():
        assert rows.start % 16 == 0
        if mask is None:
            assert kept is None
            assert torch.equal(some, codes[rows])
        else:
            assert kept is not None
            assert torch.equal(kept, mask[rows])
            assert torch.equal(some[kept], codes[rows][mask[rows]])


def test_a_mask_that_keeps_another_number_is_refused() -> None:
    tensors = compressed("magnitude(sparsity=0.7)")
    tensors["mask"] = tensors["mask"].clone().fill_(255)
    storage = plan(Scheme.parse("magnitude(sparsity=0.7)")).storage(SHAPE)
    with pytest.raises(ModelError, match="must keep 1560 of 5200 weights, but keeps 5200"):
        decode_matrix(storage, tensors, torch.float32)


@pytest.mark.parametrize("bits", range(1, 9))
def test_some_codes_are_those_of_all(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (61,), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    places = torch.randint(0, 61, (7, 5), generator=generator)
    assert torch.equal(unpack_some(packed, bits, places), codes[places])
    everything = torch.arange(61)
    assert torch.equal(unpack_some(packed, bits, everything), unpack(packed, bits, 61))
