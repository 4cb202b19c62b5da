"""Which kernel runs a layer: the fastest of those that can, for so many tokens on this device.

One token and a thousand are chosen apart, by a table that is measured where it has no entry yet,
with the layer's own weights, when the layer first runs so many tokens. Nothing is measured at
import or load.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autocompress.core.errors import UsageError, nearest
from autocompress.core.scheme import Scheme
from autocompress.kernels.base import KERNELS, Kernel, Prepared, Stored
from autocompress.kernels.paging import page_out, trim_heap
from autocompress.kernels.table import table_of
from autocompress.kernels.timing import seconds_of
from autocompress.methods.schemes import plan
from autocompress.methods.storage import WIDTH, under

AUTO, REFERENCE = "auto", "reference"
_BUCKETS = (1, 4, 16, 64, 256)


def require_choice(choice: str) -> str:
    """`choice` itself, if it is ``auto`` or the name of a kernel that runs every layer.

    Raises:
        UsageError: it is neither.
    """
    known = (AUTO, *(name for name in KERNELS if not KERNELS[name].chosen))
    if choice not in known:
        raise UsageError(f"Unknown kernels {choice!r}. {nearest(choice, known)}")
    return choice


def refusals(
    shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, device: torch.device
) -> dict[str, str]:
    """Why each kernel cannot run such a layer, by name; empty for those that can."""
    return {name: KERNELS[name].refusal(shape, scheme, dtype, device) for name in KERNELS}


def candidates(
    shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, device: torch.device
) -> tuple[Kernel[Any], ...]:
    """Kernels among which a layer's is chosen; the reference if there is no other."""
    found = tuple(
        KERNELS[name]
        for name, reason in refusals(shape, scheme, dtype, device).items()
        if not reason and KERNELS[name].chosen
    )
    return found or (KERNELS[REFERENCE],)


class Runner:
    """Runs one layer on the best kernels; remembers them and what they prepared.

    A layer of another width than the base model's is run as the smaller layer that is left: inputs
    that are gone are not multiplied, outputs that are gone are zero. A copy starts afresh: what is
    prepared belongs to tensors and a device.
    """

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        choice: str = AUTO,
    ) -> None:
        ready = plan(scheme)
        self._given = (scheme, shape, dtype, device)
        self._layer = (ready.narrow(shape), ready.inside.scheme, dtype, device)
        self._width = ready.width
        self._left: Tensor | None = None
        self._choice = require_choice(choice)
        self._chosen: dict[int, Kernel[Any]] = {}
        self._prepared: dict[str, Prepared] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        return Runner(*self._given, self._choice)

    def __reduce__(self) -> tuple[type[Runner], tuple[Any, ...]]:
        return Runner, (*self._given, self._choice)

    def __call__(self, tensors: Stored, rows: Tensor) -> Tensor:
        """``x Wᵀ`` of rows (n, d); `tensors` are the same on every call."""
        if self._width is None:
            return self._product(tensors, rows)
        left = self._indices(tensors)
        if not self._width.options.cuts_outputs:
            return self._product(tensors, rows[:, left])
        found = self._product(tensors, rows)
        return found.new_zeros(len(found), self._given[1][0]).index_copy_(1, left, found)

    def _product(self, tensors: Stored, rows: Tensor) -> Tensor:
        kernel = self.kernel_for(tensors, len(rows))
        return kernel.apply(rows, self._ready(kernel, tensors))

    def _indices(self, tensors: Stored) -> Tensor:
        """Inputs, or outputs, that are left."""
        if self._left is None:
            step, (o, d) = self._width, self._given[1]
            assert step is not None  # the caller has checked
            size = o if step.options.cuts_outputs else d
            left = step.method.left(under(WIDTH, tensors), size, step.options)
            self._left = left.to(self._given[3])
        return self._left

    @property
    def chosen(self) -> Mapping[int, str]:
        """Kernel by number of tokens, as chosen so far."""
        return {n: kernel.name for n, kernel in sorted(self._chosen.items())}

    @property
    def extra_bytes(self) -> int:
        """Memory held beyond the stored tensors."""
        kernels = {_slot(kernel): kernel for kernel in self._chosen.values()}
        return sum(kernels[slot].extra_bytes(p) for slot, p in self._prepared.items())

    def kernel_for(self, tensors: Stored, n_tokens: int) -> Kernel[Any]:
        """The kernel that runs `n_tokens`."""
        n = bucket(n_tokens)
        if n not in self._chosen:
            self._chosen[n] = self._choose(tensors, n)
        return self._chosen[n]

    def _choose(self, tensors: Stored, n_tokens: int) -> Kernel[Any]:
        if self._choice != AUTO:
            return KERNELS[self._choice]
        kernels = candidates(*self._layer)
        if len(kernels) == 1:
            return kernels[0]
        seconds = measured(lambda: tensors, *self._layer, n_tokens=n_tokens)
        return min(kernels, key=lambda kernel: seconds[kernel.name])

    def _ready(self, kernel: Kernel[Any], tensors: Stored) -> Prepared:
        slot = _slot(kernel)
        if slot not in self._prepared:
            shape, scheme, dtype, device = self._layer
            self._prepared[slot] = kernel.prepare(tensors, scheme, shape, dtype, device)
            if kernel.extra_bytes(self._prepared[slot]) and not kernel.reads_stored:
                page_out(tensors.values())  # the kernel reads its own form from now on
                trim_heap()
        return self._prepared[slot]


def _slot(kernel: Kernel[Any]) -> str:
    """Where a kernel finds what it prepared; those that read stored tensors share nothing else."""
    return kernel.name if kernel.form == "stored" else kernel.form


def bucket(n_tokens: int) -> int:
    """The number of tokens that stands for `n_tokens` in the choice of a kernel: the next below."""
    return _BUCKETS[max(0, bisect_right(_BUCKETS, n_tokens) - 1)]


def measured(
    tensors: Callable[[], Stored],
    shape: tuple[int, int],
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    *,
    n_tokens: int,
) -> Mapping[str, float]:
    """Seconds of every candidate on `n_tokens`, by name; from the table, or measured and added."""
    kernels = candidates(shape, scheme, dtype, device)
    table, key = table_of(device), entry_key(shape, scheme, dtype, n_tokens)
    known = table.get(key) or {}
    missing = [kernel for kernel in kernels if kernel.name not in known]
    if not missing:
        return known
    stored, found = tensors(), {}
    generator = torch.Generator(device).manual_seed(0)  # the global one belongs to the user
    rows = torch.randn(n_tokens, shape[1], device=device, generator=generator).to(dtype)
    for kernel in missing:
        prepared = kernel.prepare(stored, scheme, shape, dtype, device)
        found[kernel.name] = seconds_of(partial(kernel.apply, rows, prepared), device)
    table.put(key, found)
    return {**known, **found}


def entry_key(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, n_tokens: int) -> str:
    """Key of a table's entry: equal for schemes that store and compute the same."""
    name = str(dtype).removeprefix("torch.")
    return f"{shape[0]}x{shape[1]} {name} {n_tokens} tokens: {signature(shape, scheme)}"


def signature(shape: tuple[int, int], scheme: Scheme) -> str:
    """What decides about speed: how the matrices are coded, and what is done to the inputs."""
    ready, parts = plan(scheme), []
    if ready.width is not None:
        kept, what = (
            ready.width.options,
            "outputs" if ready.width.options.cuts_outputs else "inputs",
        )
        parts.append(f"{kept.keep} of {kept.of} {what}")
    if ready.transform is not None:
        parts.append(repr(ready.transform.options))
    for prefix, matrix in ready.matrices(shape).items():
        storage = ready.storage(matrix)
        kept = "" if storage.n_kept is None else f" keeps {storage.n_kept}"
        parts.append(f"{prefix}{matrix[0]}x{matrix[1]} {storage.coding!r}{kept}")
    if ready.sparsify is not None and getattr(ready.sparsify.options, "kept_of", None):
        parts.append("pattern {}:{}".format(*ready.sparsify.options.kept_of))
    for step in (ready.residual, ready.inputs):
        if step is not None:
            parts.append(repr(step.options))
    return " + ".join(parts)
