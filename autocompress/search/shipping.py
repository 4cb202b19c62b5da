"""Ship a trial context to another process without copying its tensors.

The object graph is pickled with every tensor replaced by a number; the memory that the tensors
share is kept beside it as numpy arrays of bytes. Ray hands such arrays to every process of a node
without a copy, and `build` makes tensors on that very memory: ties and views stay what they are.
Nothing here is ever written to a file.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core.errors import UsageError
from autocompress.search.context import TrialContext

_ALIGNMENT = 64

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a tensor lies.

    Attributes:
        memory: index of its memory.
        offset: first element, in bytes from the start of that memory.
        shape, stride: in elements.
        is_parameter: an `nn.Parameter`, else a tensor.
    """

    memory: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_parameter: bool
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class ContextParts:
    """A trial context as a value that any process can build.

    Attributes:
        skeleton: the pickled context, tensors replaced by indices into `tensors`.
        tensors: where each tensor lies.
        arrays: the memory; read-only for everyone who builds.
        devices: where each memory was; what was on a GPU is copied to the builder's GPU.
    """

    skeleton: bytes
    tensors: tuple[TensorSpec, ...]
    arrays: tuple[Bytes, ...]
    devices: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def needs_gpu(self) -> bool:
        """True if a part of the context was on a GPU."""
        return any(device != "cpu" for device in self.devices)

    def build(self) -> TrialContext:
        """The context, its CPU tensors on the memory of `arrays`: treat them as read-only."""
        memories = [_memory(*pair) for pair in zip(self.arrays, self.devices, strict=True)]
        unpickler = _Unpickler(self.skeleton, [_tensor(spec, memories) for spec in self.tensors])
        context = unpickler.load()
        if not isinstance(context, TrialContext):
            raise TypeError(f"Expected a trial context, but got {type(context).__name__}.")
        return context


def pack_context(context: TrialContext, *, with_statistics: bool = False) -> ContextParts:
    """Take a context apart; the arrays are views of its CPU tensors, nothing is copied.

    Args:
        context: is not changed.
        with_statistics: take the calibration statistics along, for machines that cannot read
            their files.

    Raises:
        UsageError: a part cannot be pickled, e.g. a task that is defined inside a function.
    """
    if with_statistics:
        context = replace(context, bank=context.bank.with_resident_statistics())
    table = _TensorTable()
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, table).dump(context)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise UsageError(
            f"Workers in other processes need a model, task and bank that can be pickled: {error}. "
            "Next step: define the class at the top of a module, or use --driver local."
        ) from error
    return ContextParts(buffer.getvalue(), *table.finish())


class _TensorTable:
    """Tensors met while pickling, and the ranges of memory that they use."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._tensors: list[Tensor] = []  # kept alive, so that ids stay unique
        self._memory: dict[tuple[str, int], int] = {}

    def add(self, tensor: Tensor) -> int:
        """Index of a tensor; the same object has the same index."""
        if id(tensor) not in self._index:
            self._index[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)
        return self._index[id(tensor)]

    def finish(self) -> tuple[tuple[TensorSpec, ...], tuple[Bytes, ...], tuple[str, ...]]:
        """Specs, memories and devices."""
        ranges: dict[int, tuple[int, int]] = {}
        owners: dict[int, Tensor] = {}
        for tensor in self._tensors:
            memory, start = self._place(tensor), _start(tensor)
            low, high = ranges.get(memory, (start, start))
            ranges[memory] = (min(low, start), max(high, start + _extent(tensor)))
            owners.setdefault(memory, tensor)
        starts = {memory: low - low % _ALIGNMENT for memory, (low, _) in ranges.items()}
        specs = tuple(_spec(t, self._place(t), starts[self._place(t)]) for t in self._tensors)
        arrays = tuple(_bytes(owners[m], starts[m], ranges[m][1]) for m in sorted(owners))
        return specs, arrays, tuple(owners[m].device.type for m in sorted(owners))

    def _place(self, tensor: Tensor) -> int:
        key = (str(tensor.device), tensor.untyped_storage().data_ptr())
        return self._memory.setdefault(key, len(self._memory))


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, table: _TensorTable) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._table = table

    def persistent_id(self, value: object) -> int | None:
        """Replaces plain dense tensors; others (sparse, meta, subclasses) are pickled whole."""
        if type(value) not in (Tensor, nn.Parameter) or not isinstance(value, Tensor):
            return None
        is_plain = value.layout is torch.strided and not value.is_meta and value.numel() > 0
        return self._table.add(value) if is_plain else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, tensors: Sequence[Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensors = tensors

    def persistent_load(self, index: int) -> Tensor:
        return self._tensors[index]


def _start(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to behind the last element."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * step for size, step in pairs)) * tensor.element_size()


def _spec(tensor: Tensor, memory: int, start: int) -> TensorSpec:
    return TensorSpec(
        memory=memory,
        offset=_start(tensor) - start,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        is_parameter=isinstance(tensor, nn.Parameter),
        requires_grad=tensor.requires_grad,
    )


def _bytes(tensor: Tensor, start: int, stop: int) -> Bytes:
    storage = tensor.detach().untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
    array: Bytes = flat[start:stop].cpu().numpy()
    return array


def _memory(array: Bytes, device: str) -> torch.UntypedStorage:
    with warnings.catch_warnings():
        # Ray's arrays are marked read-only, which torch cannot express; the guard of version
        # counters around each trial stands in for it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(array)
    return flat.to(device).untyped_storage()


def _tensor(spec: TensorSpec, memories: Sequence[torch.UntypedStorage]) -> Tensor:
    memory = memories[spec.memory]
    start, odd = divmod(spec.offset, spec.dtype.itemsize)
    if odd:
        raise ValueError(f"A tensor of {spec.dtype} cannot start at byte {spec.offset}.")
    tensor = torch.empty(0, dtype=spec.dtype, device=memory.device)
    tensor.set_(memory, start, spec.shape, spec.stride)
    if spec.is_parameter:
        return nn.Parameter(tensor, requires_grad=spec.requires_grad)
    return tensor.requires_grad_(spec.requires_grad)
