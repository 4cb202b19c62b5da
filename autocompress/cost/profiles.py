"""Named devices: what a roofline needs to know of them. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from autocompress.core.digest import digest
from autocompress.core.errors import UsageError
from autocompress.core.registry import Registry
from autocompress.cost.latency import LatencyTable

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Peak rates of a device.

    Attributes:
        name: as on the command line.
        flops_per_second: dense matrix products in the dtype that the device is used with
            (bfloat16 with float32 accumulation unless `origin` says otherwise); a
            multiply-accumulate is two.
        bytes_per_second: read bandwidth of the memory that holds the weights.
        memory_bytes: size of that memory.
        origin: where the numbers are from.
        latency: times of a model's layers, measured on the device; None if there are none.
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: int
    origin: str
    latency: LatencyTable | None = None

    def __post_init__(self) -> None:
        for field in ("flops_per_second", "bytes_per_second", "memory_bytes"):
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(
                    f"{field} of device profile {self.name!r} must be positive and finite, but got "
                    f"{value!r}. The profiles that ship are in autocompress.cost.PROFILES."
                )

    @property
    def digest(self) -> str:
        """Stable across processes; equal for profiles that give equal times."""
        return digest({name: value for name, value in self.to_json().items() if name != "origin"})

    def to_json(self) -> dict[str, Any]:
        """All fields by name; without `latency` if there is none."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        del found["latency"]
        return found if self.latency is None else {**found, "latency": self.latency.to_json()}


PROFILES: Registry[DeviceProfile] = Registry("device profile")

DEFAULT_PROFILE = "cpu-2core-avx512"
"""What a search assumes when no device is named: a small machine without an accelerator."""


def _ship(
    name: str, flops_per_second: float, bytes_per_second: float, memory_gib: int, origin: str
) -> None:
    profile = DeviceProfile(name, flops_per_second, bytes_per_second, memory_gib * _GIB, origin)
    PROFILES.add(name, profile)


_ship(
    "cpu-2core-avx512", 1.7e11, 2.2e10, 16,
    "measured: float32 linear 1024 -> 4096 (torch 2.13, batch 128 and batch 1) on one thread of a "
    "virtual machine of the Sapphire Rapids class, times 2 cores; memory assumed",
)  # fmt: skip
_ship(
    "cpu-2core-amx", 6.7e11, 2.2e10, 16,
    "measured: as cpu-2core-avx512, with bfloat16 matrix products on AMX",
)  # fmt: skip
_ship(
    "cpu-2core-avx2", 1.8e11, 4.0e10, 16,
    "measured: float32 linear of 1024 tokens 2048 -> 4096 and a 256 MB sum (torch 2.13, 2 threads) "
    "on 2 virtual cores of an AMD EPYC without AVX-512; memory assumed",
)  # fmt: skip
_ship(
    "cpu-server", 1.147e14, 3.072e11, 512,
    "peak of one Intel Xeon Platinum 8480+: 56 cores x 2.0 GHz x 1024 bfloat16 operations per "
    "cycle (AMX), 8 channels of DDR5-4800; memory assumed (8 x 64 GiB)",
)  # fmt: skip
_ship(
    "rtx-4090", 1.652e14, 1.008e12, 24,
    "NVIDIA Ada GPU architecture whitepaper: bfloat16 tensor cores with float32 accumulation, "
    "dense; 24 GB GDDR6X",
)  # fmt: skip
_ship(
    "a100-80gb", 3.12e14, 2.039e12, 80,
    "NVIDIA A100 80GB SXM datasheet: bfloat16 tensor cores, dense; HBM2e",
)  # fmt: skip
_ship(
    "h100-sxm", 9.89e14, 3.35e12, 80,
    "NVIDIA H100 SXM datasheet: bfloat16 tensor cores, dense (half of the figure with sparsity); "
    "80 GB HBM3",
)  # fmt: skip
