"""Kernels in C: the same numbers however they are compiled, and none where they cannot be."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autocompress.core import Scheme
from autocompress.kernels import KERNELS, Runner, native_grid, refusals
from autocompress.methods import LayerStatistics, compress
from autocompress.methods.trellis import TrellisCoding
from autocompress.methods.viterbi import Trellis
from autocompress.native import build

from .conftest import COMPILER, CPU, errors, prepared, tokens

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
SCHEMES = (
    *(f"rtn(bits={bits},group_size=32)" for bits in range(2, 9)),
    *(f"rtn(bits={bits},group_size=24,symmetric=false)" for bits in range(2, 9)),
    *(f"rtn(bits={bits},group_size=0)" for bits in (3, 4, 6, 7, 8)),
    "hadamard+rtn(bits=5,group_size=0)+int_inputs",
)


def layer(scheme: str, shape: tuple[int, int] = (13, 104)):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) + 0.3
    return compress(weight, Scheme.parse(scheme), LayerStatistics.none())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_and_entries_are_those_of_the_decoded_matrix(scheme: str, functions) -> None:
    weight = layer(scheme)
    for name in ("native", "native_tiles"):
        ready = prepared(name, weight, torch.float32, CPU)
        ready = replace(ready, state=replace(ready.state, functions=functions))
        for n in (1, 2, 5):
            rows = tokens(n, 104)
            got = KERNELS[name].apply(rows, ready)
            worst = errors(name, weight, got, rows, ready)
            assert worst <= KERNELS[name].tolerance(torch.float32, CPU)
    if "hadamard" not in scheme:
        entries = torch.empty(weight.shape)
        functions.grid_values(*ready.state.described, 0, 13, entries.data_ptr(), 2)
        assert torch.equal(entries, weight.to_dense())
        part = torch.empty(4, 104)
        functions.grid_values(*ready.state.described, 9, 13, part.data_ptr(), 1)
        assert torch.equal(part, entries[9:])


@pytest.fixture
def panels() -> object:
    """The C of this processor, if it has products in bfloat16."""
    if build.missing() or not build.has_panels(build.library()):
        pytest.skip("needs a compiler and AVX-512 BF16")
    return build.library()


PANEL_SCHEMES = (
    *(f"rtn(bits={bits},group_size=32)" for bits in range(2, 9)),
    *(f"rtn(bits={bits},group_size=24,symmetric=false)" for bits in range(2, 9)),
    "rtn(bits=3,group_size=8)",
    "rtn(bits=4,group_size=0)",
)


@pytest.mark.parametrize("scheme", PANEL_SCHEMES)
@pytest.mark.parametrize("shape", [(1, 8), (13, 104), (70, 40), (150, 72)])
def test_panels_multiply_by_each_entry_rounded_to_bfloat16(scheme, shape, panels) -> None:
    """One input is 1 and the others are 0: outputs are entries, whatever their place."""
    weight = layer(scheme, shape)
    ready = prepared("native_panels", weight, torch.float32, CPU)
    found = KERNELS["native_panels"].apply(torch.eye(shape[1]), ready)
    assert torch.equal(found, weight.to_dense().bfloat16().float().T)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 48, 49, 100])
@pytest.mark.parametrize("shape", [(37, 104), (24, 2048), (5, 4128)])
def test_panels_of_any_number_of_tokens_add_up(n: int, shape, panels) -> None:
    """Deeper than a tile, too; inputs are rounded once, sums stay float32."""
    weight = layer("rtn(bits=4,group_size=32,symmetric=false)", shape)
    ready = prepared("native_panels", weight, torch.float32, CPU)
    rows = tokens(n, shape[1])
    found = KERNELS["native_panels"].apply(rows, ready)
    exact, matrix = rows.bfloat16().double(), weight.to_dense().bfloat16().double()
    assert ((found - exact @ matrix.T).abs() <= 2e-5 * (exact.abs() @ matrix.abs().T)).all()
    worst = errors("native_panels", weight, found, rows, ready)
    assert worst <= KERNELS["native_panels"].tolerance(torch.float32, CPU)
    assert torch.equal(found[-1:], KERNELS["native_panels"].apply(rows[-1:], ready))


def test_panels_are_refused_in_float16_and_where_the_processor_has_none(
    panels, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = Scheme.parse("rtn(bits=4,group_size=32)")
    assert "coarser than float16" in refusals((8, 64), scheme, torch.float16, CPU)["native_panels"]
    monkeypatch.setattr(native_grid, "has_panels", lambda _: False)
    assert "AVX-512 BF16" in refusals((8, 64), scheme, torch.float32, CPU)["native_panels"]


@needs_compiler
def test_panels_are_compiled_for_wide_vectors_only(tmp_path: Path) -> None:
    assert COMPILER is not None
    for flags, macro in (((),), "-DPORTABLE"), (build.FLAGS, "-DNARROW"):
        assert not build.has_panels(build.load(build.compiled(COMPILER, tmp_path, flags, macro)))


@needs_compiler
def test_scales_of_every_size_are_read_exactly() -> None:
    weight = layer("rtn(bits=8,group_size=8)", (4, 32))
    halves = torch.tensor([1.0, 65504, 6.1e-5, 6e-8, 5.9e-5, 0, 0.333, 1e-4] * 2).half()
    tensors = {**weight.tensors, "scales": halves.view(4, 4) * torch.tensor([[1], [-1], [1], [1]])}
    changed = replace(weight, tensors=tensors)
    ready = prepared("native", changed, torch.float32, CPU)
    entries = torch.empty(4, 32)
    ready.state.functions.grid_values(*ready.state.described, 0, 4, entries.data_ptr(), 1)
    assert torch.equal(entries, changed.to_dense())


@needs_compiler
@pytest.mark.parametrize(("name", "n"), [("native", 3), ("native_panels", 300)])
def test_threads_change_no_bit(name: str, n: int) -> None:
    weight = layer("rtn(bits=3,group_size=64)", (700, 512))
    if refusals(weight.shape, weight.scheme, torch.float32, CPU)[name]:
        pytest.skip(f"{name} does not run here")
    ready = prepared(name, weight, torch.float32, CPU)
    rows, before = tokens(n, 512), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(KERNELS[name].apply(rows, ready))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="guards a page by mprotect")
def test_nothing_behind_the_codes_is_read() -> None:
    """They end where a page ends that is followed by one that nobody may touch."""
    program = """
import ctypes, itertools, mmap, torch
from autocompress.native.build import has_panels, library
page, o = mmap.PAGESIZE, 3
memory = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
for d, bits in itertools.product((24, 104), range(1, 9)):
    scales, x, y = torch.ones(o, 1).half(), torch.ones(2, d), torch.empty(2, o)
    out = torch.empty(o, d)
    codes = start + page - o * d // 8 * bits
    grid = (codes, scales.data_ptr(), 0, o, d, d, bits)
    library().grid_product(*grid, x.data_ptr(), 2, y.data_ptr(), 1)
    library().grid_values(*grid, 0, o, out.data_ptr(), 1)
    assert torch.equal(y[0], out.sum(1)) and float(out[0, 0]) == -(2 ** (bits - 1))
    if has_panels(library()):
        library().grid_panels(*grid, x.data_ptr(), 2, y.data_ptr(), 1)
        assert torch.equal(y[0], out.sum(1))
print("read")
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "read"), ended.stderr


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        ("rtn(bits=4,group_size=32)", (8, 36), "multiples of 8"),
        ("rtn(bits=4,group_size=12)", (8, 24), "multiples of 8"),
        ("magnitude(sparsity=0.9)+rtn(bits=4,group_size=32)", (8, 64), "zeros are not stored"),
        ("nf4", (8, 64), "not integers on a grid"),
        ("svd(rank=2)+rtn", (8, 64), "not integers on a grid"),
    ],
)
def test_what_the_c_cannot_read_is_refused(scheme: str, shape, reason: str) -> None:
    found = refusals(shape, Scheme.parse(scheme), torch.float32, CPU)
    assert reason in found["native"]
    assert reason in found["native_tiles"]


@needs_compiler
def test_codes_of_pruned_weights_that_are_stored_are_read() -> None:
    """Where storing the zeros is cheaper than a mask."""
    scheme = "magnitude(sparsity=0.05)+rtn(bits=4,group_size=32)"
    weight = layer(scheme)
    assert "mask" not in weight.tensors
    ready = prepared("native", weight, torch.float32, CPU)
    rows = tokens(3, 104)
    worst = errors("native", weight, KERNELS["native"].apply(rows, ready), rows, ready)
    assert worst <= KERNELS["native"].tolerance(torch.float32, CPU)


@needs_compiler
def test_nothing_is_held_beside_the_file() -> None:
    symmetric, other = layer("rtn(bits=4)"), layer("rtn(bits=4,symmetric=false)")
    kernel = KERNELS["native"]
    assert kernel.extra_bytes(prepared("native", symmetric, torch.float32, CPU)) == 0
    assert kernel.extra_bytes(prepared("native", other, torch.float32, CPU)) == 13


def test_the_switch_keeps_the_compiler_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.missing() == "AUTOCOMPRESS_NATIVE is 0"
    with pytest.raises(build.NativeError, match="is 0"):
        build.library()


def test_without_a_compiler_other_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    scheme = Scheme.parse("rtn(bits=4,group_size=32)")
    assert (
        "no C compiler (no-such-compiler)"
        in refusals((64, 128), scheme, torch.float32, CPU)["native"]
    )
    weight = layer(str(scheme), (64, 128))
    rows = tokens(2, 128)
    run = Runner(scheme, (64, 128), torch.float32, CPU)
    torch.testing.assert_close(
        run(weight.tensors, rows), rows @ weight.to_dense().T, rtol=0.1, atol=0.5
    )


def test_a_compiler_that_fails_is_said_once(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    (own_cache / "native").unlink()
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho cannot compile >&2\n[ $1 = --version ]\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with caplog.at_level(logging.WARNING):
        assert (
            "does not compile grid.c, panels.c, rotation.c, trellis.c: cannot compile"
            in build.missing()
        )
        build.missing()
    assert len(caplog.records) == 1
    assert not list((own_cache / "native").glob("*.so"))


@needs_compiler
def test_a_damaged_library_is_compiled_again(own_cache: Path) -> None:
    (own_cache / "native").unlink()
    assert COMPILER is not None
    path = build.kept(COMPILER, own_cache / "native")
    assert build.kept(COMPILER, own_cache / "native") == path
    path.write_bytes(b"not a library")
    assert build.missing() == ""
    build.load(path)


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("n", [16, 40, 256])
def test_c_and_torch_find_the_same_path(bits: int, n: int, functions) -> None:
    trellis = TrellisCoding(bits).trellis
    x, w = torch.randn(n), torch.randn(n).exp()
    assert torch.equal(trellis.by_c(x, w, functions), trellis.by_torch(x, w))


@pytest.mark.parametrize("window", [4, 7, 12])
def test_c_and_torch_cut_the_same_cycles(window: int, functions) -> None:
    trellis = Trellis(torch.randn(1 << window), 3, run=32)
    x, w = torch.randn(110), torch.ones(110)
    assert trellis.bounds(110) == [(0, 32), (32, 64), (64, 110)]
    assert torch.equal(trellis.by_c(x, w, functions), trellis.by_torch(x, w))
