"""Rotations in C: those of the definition, however they are compiled and whatever the size."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from autocompress.core import Scheme
from autocompress.kernels.basis import Rotation, entrance, rotation
from autocompress.methods.hadamard import Hadamard, HadamardOptions, rotated
from autocompress.methods.schemes import Step, plan
from autocompress.methods.storage import TRANSFORM, under
from autocompress.native import build

from .conftest import COMPILER, CPU, compressed, prepared, tokens

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
RESTS = (3, 37, 90, 104, 384, 640, 768, 896, 1536, 2048, 3072, 4544, 5120, 5632, 11008, 12288)
LARGE = (14336, 18944, 2 * 1009)


def rounding(d: int, rows: torch.Tensor) -> torch.Tensor:
    """What float32 may lose of each row's sums, (rows, 1): Higham 2002, section 3.1."""
    n = d & -d
    steps = math.log2(n) + d // n + 3
    return steps * 2**-24 * math.sqrt(2 / d) * rows.double().abs().sum(1, keepdim=True)


@pytest.mark.parametrize("d", [*POWERS, *RESTS, *LARGE])
def test_rows_are_rotated_as_defined(d: int, functions) -> None:
    turn = rotation(d, 5, functions)
    for n in (1, 3, 128 if d < 2000 else 17):
        rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
        before = rows.clone()
        exact = rotated(rows.double(), 5)
        found = turn(rows)
        assert found.shape == rows.shape
        assert ((found - exact).abs() <= rounding(d, rows)).all()
        assert ((found - rotated(rows, 5)).abs() <= 2 * rounding(d, rows)).all()
        assert torch.equal(rows, before)


@pytest.mark.parametrize("d", [90, 1024, 1536])
def test_neither_threads_nor_other_rows_change_a_bit(d: int, functions) -> None:
    turn, rows = rotation(d, 0, functions), torch.randn(400, d)
    alone = torch.cat([turn(row[None]) for row in rows])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(turn(rows), alone)
    finally:
        torch.set_num_threads(before)


def test_rows_lie_anywhere(functions) -> None:
    turn, rows = rotation(96, 0, functions), torch.randn(4, 96)
    apart = torch.zeros(8, 96)
    apart[::2] = rows
    shifted = torch.cat([torch.zeros(1), rows.flatten()])[1:].view(4, 96)
    for other in (apart[::2], rows.T.contiguous().T, shifted):
        assert torch.equal(turn(other), turn(rows))
        assert turn(other).is_contiguous()


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="guards a page by mprotect")
def test_nothing_around_the_rows_is_touched() -> None:
    """Inputs and outputs end where a page ends that is followed by one that nobody may touch."""
    program = """
import ctypes, mmap, torch
from autocompress.kernels.basis import rotation
from autocompress.native.build import library
page, size = mmap.PAGESIZE, 4 * mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
def guarded(d):
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    floats = torch.frombuffer(memory, dtype=torch.float32, count=3 * d, offset=size - 12 * d)
    return floats.view(3, d), memory
for d in (3, 24, 37, 48, 640, 1024):
    (x, _), (y, around) = guarded(d), guarded(d)
    x.copy_(torch.randn(3, d))
    turn = rotation(d, 0, library())
    library().rotation(*turn.described, x.data_ptr(), 3, y.data_ptr(), 1)
    assert torch.equal(y, turn(x.clone())) and not any(around[: size - 12 * d])
print("rotated")
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "rotated"), ended.stderr


@needs_compiler
def test_layers_are_rotated_by_c_on_cpus_with_a_compiler_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, rows = compressed("hadamard+rtn(bits=6,group_size=0)"), tokens(5)
    by_c = prepared("tiles", weight, torch.float32, CPU)
    assert isinstance(by_c.entrance, Rotation)
    step = plan(weight.scheme).transform
    assert step is not None
    assert not isinstance(entrance(step, {}, 128, torch.device("meta")), Rotation)
    monkeypatch.setenv(build.SWITCH, "0")
    by_products = prepared("tiles", weight, torch.float32, CPU)
    assert not isinstance(by_products.entrance, Rotation)
    exact = rotated(rows.double(), 0)
    for ready in (by_c, by_products):
        assert ((ready.entered(rows, False) - exact).abs() <= 4 * rounding(128, rows)).all()


@needs_compiler
def test_layers_of_as_many_inputs_share_one_rotation_by_seed() -> None:
    found = [
        prepared("tiles", compressed(scheme, shape), torch.float32, CPU).entrance
        for scheme, shape in (
            ("hadamard+rtn(bits=4)", (24, 64)),
            ("hadamard+nf4(group_size=64)", (8, 64)),
            ("hadamard(seed=1)+rtn(bits=4)", (24, 64)),
        )
    ]
    assert found[0] is found[1]
    assert found[0] is not found[2]


@needs_compiler
def test_other_transforms_enter_in_their_own_way() -> None:
    class Doubled(Hadamard):
        def inputs_of_kernels(self, rows, stored, options):
            return 2 * rows

    own = entrance(Step(Doubled(), HadamardOptions()), {}, 128, CPU)
    assert torch.equal(own(tokens(2)), 2 * tokens(2))
    weight = compressed("awq(search=2)+rtn(bits=4,group_size=64)")
    ready = prepared("tiles", weight, torch.float32, CPU)
    step = plan(Scheme.parse("awq(search=2)")).transform
    assert step is not None
    expected = step.method.inputs(tokens(2), under(TRANSFORM, weight.tensors), step.options)
    assert torch.equal(ready.entered(tokens(2), False), expected)


def test_too_little_memory_is_said() -> None:
    none = SimpleNamespace(rotation=lambda *_: 1)
    with pytest.raises(MemoryError, match="rotation of 3 tokens"):
        Rotation(torch.ones(96), torch.ones(3, 3), none)(torch.zeros(3, 96))
