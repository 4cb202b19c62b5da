"""Stored tensors give their memory back once a kernel holds its own form of them."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from autocompress.core import Scheme
from autocompress.kernels import Runner
from autocompress.kernels.measure import layer_of, random_tensors
from autocompress.kernels.paging import page_out

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Linux drops pages if asked")


def resident_bytes(path: Path) -> int:
    """What this process has in memory of a mapped file."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            counts = line.endswith(str(path))
        elif counts and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def mapped(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a checkpoint's are: mapped from a file."""
    save_file(tensors, path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in tensors}


def test_pages_of_a_mapped_tensor_are_dropped_and_read_again(tmp_path: Path) -> None:
    """Nothing of the contents is lost."""
    path = tmp_path / "weights.safetensors"
    expected = torch.arange(1 << 20, dtype=torch.int32)
    found = mapped(path, {"weight": expected})["weight"]
    assert torch.equal(found, expected)
    assert resident_bytes(path) >= found.nbytes
    agreed = page_out([found])
    if not agreed:
        pytest.skip("this kernel knows no MADV_PAGEOUT")
    assert found.nbytes - 8192 <= agreed <= found.nbytes
    assert resident_bytes(path) < found.nbytes / 2
    assert torch.equal(found, expected)


def test_what_was_written_since_stays(tmp_path: Path) -> None:
    """A private page that differs from the file has no other home."""
    found = mapped(tmp_path / "weights.safetensors", {"weight": torch.zeros(1 << 20)})["weight"]
    found[5] = 1.0
    page_out([found])
    assert found[5] == 1.0
    assert found.sum() == 1.0


def test_memory_that_is_no_file_is_left_alone() -> None:
    """Without swap its pages could go nowhere; with it, they would only be slower."""
    assert page_out([torch.ones(1 << 20), torch.ones(3), torch.ones(0)]) == 0


def test_a_kernel_with_its_own_form_lets_the_stored_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And outputs stay the same when the stored tensors come back."""
    monkeypatch.setenv("AUTOCOMPRESS_NATIVE", "0")
    path = tmp_path / "layer.safetensors"
    scheme, shape = Scheme.parse("rtn(bits=8,group_size=0)"), (4096, 1024)
    tensors = mapped(path, random_tensors(layer_of(shape, torch.float32), scheme))
    stored = sum(tensor.nbytes for tensor in tensors.values())
    runner = Runner(scheme, shape, torch.float32, torch.device("cpu"), "auto")
    rows = torch.randn(1, 1024, generator=torch.Generator().manual_seed(1))
    first = runner(tensors, rows)
    if not runner.extra_bytes:
        pytest.skip("the kernel of this machine reads the stored tensors")
    left = resident_bytes(path)
    if not page_out(tensors.values()):
        pytest.skip("this kernel knows no MADV_PAGEOUT")
    assert left < stored / 2
    assert torch.equal(runner(tensors, rows), first)
