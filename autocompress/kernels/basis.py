"""How inputs enter the basis of a scheme's transform, in the fastest way that there is here.

The method's own way runs anywhere. On CPUs the rotation of `hadamard` is C that is compiled here:
log2(n) rounds of sums and differences that stay in registers and the first cache, where torch
would pass over the inputs for each.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from autocompress.methods.base import Transform
from autocompress.methods.hadamard import Hadamard, signs_and_cosines
from autocompress.methods.schemes import Step
from autocompress.native.build import library, missing

Entrance = Callable[[Tensor], Tensor]
"""``T^-1 x`` of inputs (n, d) float32."""


def entrance(
    step: Step[Transform[Any]], stored: Mapping[str, Tensor], d: int, device: torch.device
) -> Entrance:
    """That of a transform whose tensors are `stored`, for layers of `d` inputs on `device`."""
    if type(step.method) is Hadamard and device.type == "cpu" and not missing():
        return rotation(d, step.options.seed, library())
    return lambda rows: step.method.inputs_of_kernels(rows, stored, step.options)


@dataclass(frozen=True, eq=False)
class Rotation:
    """``diag(signs) (C_m x H_n)`` by C.

    Attributes:
        signs: (m n,) float32, of the size that makes H_n orthonormal.
        mixing: C_m transposed, (m, m) float32.
        functions: the C.
    """

    signs: Tensor
    mixing: Tensor
    functions: ctypes.CDLL

    @cached_property
    def described(self) -> tuple[int, ...]:
        """What the C takes of it."""
        m = len(self.mixing)
        return self.signs.data_ptr(), self.mixing.data_ptr(), m, len(self.signs) // m

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (n, d) float32, rotated; equal for each row, whatever the others."""
        rows = rows.contiguous()
        found, n = torch.empty_like(rows), len(rows)
        if self.functions.rotation(
            *self.described, rows.data_ptr(), n, found.data_ptr(), torch.get_num_threads()
        ):
            raise MemoryError(f"There is no memory for a rotation of {n} tokens.")
        return found


@lru_cache(maxsize=64)
def rotation(d: int, seed: int, functions: ctypes.CDLL) -> Rotation:
    """That of all layers of `d` inputs whose signs have one seed."""
    signs, cosines = signs_and_cosines(d, seed)
    size = math.sqrt(len(cosines) / d)
    return Rotation((signs.double() * size).float(), cosines.T.float().contiguous(), functions)
