"""Measure what this machine computes and reads per second, as a device profile."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from autocompress.core.errors import UsageError
from autocompress.core.machine import cpu_model, memory_bytes
from autocompress.cost import DeviceProfile
from autocompress.kernels.timing import timed
from autocompress.models.loading import device_refusal

_DTYPES = ("float32", "bfloat16")
_TOKENS, _INPUTS, _OUTPUTS = 512, 1024, 4096
_MATRIX_BYTES = 256 << 20  # beyond any cache of a CPU or GPU
_TIMES = 5
_HOPELESS = 3.0  # a dtype so much slower than float32 on a small product is not measured further


def measure_device(device: str = "cpu") -> DeviceProfile:
    """Peak rates of this machine, as matrix products of the usual shapes reach them.

    FLOP/s are those of 512 tokens through a 1024 x 4096 layer in the fastest dtype, bytes per
    second those of a matrix-vector product over 256 MiB: what decoding a token does. Each is the
    best of five, on torch's threads.

    Args:
        device: torch device.

    Raises:
        UsageError: the device cannot be used here.
    """
    if refusal := device_refusal(device):
        raise UsageError(refusal)
    where = torch.device(device)
    rates = {
        dtype: _flops_per_second(dtype, where) for dtype in _DTYPES if _worthwhile(dtype, where)
    }
    fastest = max(rates, key=rates.__getitem__)
    spoken = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
    threads = "" if where.type == "cuda" else f" on {torch.get_num_threads()} threads"
    return DeviceProfile(
        name=_name(where),
        flops_per_second=rates[fastest],
        bytes_per_second=_bytes_per_second(where),
        memory_bytes=_memory(where),
        origin=f"measured{threads} with torch {torch.__version__}: {spoken}; 256 MiB read by a "
        "matrix-vector product",
    )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return f"{_slug(cpu_model())}-{torch.get_num_threads()}-threads"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        total: int = torch.cuda.mem_get_info(device)[1]
        return total
    return memory_bytes()


def _worthwhile(dtype: str, device: torch.device) -> bool:
    """Whether a dtype is not hopelessly slow here: emulated products take minutes."""
    small = [_seconds(_product(d, device, 32, 256, 256), device) for d in (dtype, _DTYPES[0])]
    return small[0] <= _HOPELESS * small[1]


def _flops_per_second(dtype: str, device: torch.device) -> float:
    shape = (_TOKENS, _INPUTS, _OUTPUTS)
    return 2.0 * _TOKENS * _INPUTS * _OUTPUTS / _seconds(_product(dtype, device, *shape), device)


def _bytes_per_second(device: torch.device) -> float:
    width = int((_MATRIX_BYTES / 4) ** 0.5)
    return 4.0 * width * width / _seconds(_product("float32", device, 1, width, width), device)


def _product(
    dtype: str, device: torch.device, tokens: int, inputs: int, outputs: int
) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    left = torch.randn(tokens, inputs, generator=generator).to(device, kind)
    right = torch.randn(outputs, inputs, generator=generator).to(device, kind)
    return lambda: torch.nn.functional.linear(left, right)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The best of a few, after one that warms up."""
    return min([timed(work, device) for _ in range(_TIMES + 1)][1:])
