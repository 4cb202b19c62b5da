"""A stored matrix read by slices of rows: bounded memory, temporaries that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.methods.coding import Stored
from autocompress.methods.packing import unpack
from autocompress.methods.storage import MatrixStorage

_WEIGHTS = 1 << 18  # 1 MiB of float32 stays in the cache
_WEIGHTS_TO_COPY = 1 << 20  # where they leave the cache anyway, fewer calls count more
_WHOLE = 4  # slices' worth of weights that are decoded as a whole
_WEIGHTS_ON_GPU = 1 << 24
ALIGNED = 8  # so many rows of codes of any width start on a byte


@dataclass(frozen=True, eq=False)
class Slices:
    """A stored matrix that decodes by slices of rows.

    Attributes:
        storage: of the whole matrix.
        tensors: stored.
        n_rows: rows of a slice, but for the last; a multiple of eight.
        starts: kept entries before each slice of a sparse matrix, and in all; else empty.
    """

    storage: MatrixStorage
    tensors: Stored
    n_rows: int
    starts: tuple[int, ...]

    @classmethod
    def of(
        cls,
        storage: MatrixStorage,
        tensors: Stored,
        multiple: int = ALIGNED,
        n_weights: int | None = None,
    ) -> Slices:
        """Slices of a multiple of `multiple` rows, about `n_weights`; a mask is counted once.

        Raises:
            ModelError: the mask keeps another number than the scheme says.
        """
        device = next(iter(tensors.values())).device
        n_rows = rows_per_slice(storage.shape[1], device, multiple, n_weights)
        plain = cls(storage, tensors, n_rows, ())
        if "mask" not in tensors:
            return plain
        kept = [plain._mask(start, stop).sum() for start, stop in plain.bounds()]
        starts = (0, *(torch.stack(kept).cumsum(0).tolist() if kept else ()))
        storage.require_kept(starts[-1])
        return cls(storage, tensors, n_rows, starts)

    def bounds(self) -> list[tuple[int, int]]:
        """(first row, row after the last) of each slice."""
        n = self.storage.shape[0]
        return [(start, min(start + self.n_rows, n)) for start in range(0, n, self.n_rows)]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and what they hold, (rows, d): plain values in their dtype, else float32."""
        for index, (start, stop) in enumerate(self.bounds()):
            yield slice(start, stop), self._decoded(index, start, stop)

    def coded(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Rows, their codes (rows, codes per row) and the mask of a sparse matrix.

        A code where the mask is False means nothing.
        """
        for index, (start, stop) in enumerate(self.bounds()):
            if self.starts:
                mask = self._mask(start, stop)
                yield slice(start, stop), self._spread(index, mask), mask
            else:
                yield slice(start, stop), self._rows_of_codes(start, stop), None

    def _decoded(self, index: int, start: int, stop: int) -> Tensor:
        if self.starts:
            mask = self._mask(start, stop)
            spread = self._spread(index, mask)
            if self.storage.coding is not None:
                spread = self._values(spread, start, stop)
            return spread * mask.to(spread.dtype)
        if self.storage.coding is None:
            return self.tensors["values"][start:stop]
        if not self.storage.coding.by_rows:
            rows = torch.arange(start, stop, device=self.tensors["packed"].device)
            return self.storage.decode_rows(self.tensors, rows)
        return self._values(self._rows_of_codes(start, stop), start, stop)

    def _rows_of_codes(self, start: int, stop: int) -> Tensor:
        assert self.storage.coding is not None  # callers have checked
        width = self.storage.coding.codes_per_row(self.storage.shape[1])
        return self._codes(start * width, stop * width).view(stop - start, width)

    def _spread(self, index: int, mask: Tensor) -> Tensor:
        """Kept entries of slice `index` at their places; others mean nothing."""
        start, stop = self.starts[index], self.starts[index + 1]
        if self.storage.coding is None:
            entries = self.tensors["values"][start:stop]
        else:
            aligned = start // ALIGNED * ALIGNED
            entries = self._codes(aligned, stop)[start - aligned :]
        if not len(entries):
            return entries.new_zeros(mask.shape)
        places = mask.view(-1).cumsum(0, dtype=torch.int32).sub_(1).clamp_(min=0)
        return entries.index_select(0, places).view(mask.shape)

    def _codes(self, start: int, stop: int) -> Tensor:
        """Codes `start` to `stop` in storage order; `start` is a multiple of eight."""
        coding, shape = self.storage.coding, self.storage.shape
        assert coding is not None  # callers have checked
        first, last = (coding.code_bytes(shape, n) for n in (start, stop))
        return coding.unpack(self.tensors["packed"][first:last], shape, stop - start)

    def _values(self, codes: Tensor, start: int, stop: int) -> Tensor:
        coding, shape = self.storage.coding, self.storage.shape
        assert coding is not None  # callers have checked
        rows = torch.arange(start, stop, device=codes.device)
        return coding.values(codes, self.storage.parameters(self.tensors), shape, rows)

    def _mask(self, start: int, stop: int) -> Tensor:
        columns = self.storage.shape[1]
        n = (stop - start) * columns
        first = start * columns // 8
        bits = unpack(self.tensors["mask"][first : first + -(-n // 8)], 1, n)
        return bits.view(torch.bool).view(stop - start, columns)


def rows_per_slice(
    columns: int, device: torch.device, multiple: int = ALIGNED, n_weights: int | None = None
) -> int:
    """Rows of `columns` weights to decode at once, a multiple of `multiple`."""
    usual = _WEIGHTS if device.type == "cpu" else _WEIGHTS_ON_GPU
    return max(multiple, (n_weights or usual) // columns // multiple * multiple)


def _same(rows: Tensor) -> Tensor:
    return rows


def decode_matrix(
    storage: MatrixStorage,
    tensors: Stored,
    dtype: torch.dtype,
    then: Callable[[Tensor], Tensor] = _same,
) -> Tensor:
    """The whole matrix (o, d) in `dtype`, equal to ``then(storage.decode(tensors)).to(dtype)``.

    A large one is read slice by slice: memory is that of the result and little else. Plain values
    of that dtype come back without a copy.

    Args:
        storage: how it is stored.
        tensors: stored.
        dtype: of the result.
        then: what becomes of rows, each on its own.
    """
    is_sparse, coding = "mask" in tensors, storage.coding
    by_rows = is_sparse if coding is None else coding.by_rows and coding.stores_codes
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    n_weights = _WEIGHTS if is_sparse else _WEIGHTS_TO_COPY
    if device.type != "cpu":
        n_weights = _WEIGHTS_ON_GPU
    if not by_rows or storage.n_entries <= _WHOLE * n_weights:
        return then(storage.decode(tensors)).to(dtype)
    found = torch.empty(storage.shape, dtype=dtype, device=device)
    for rows, values in Slices.of(storage, tensors, n_weights=n_weights):
        found[rows] = then(values)
    return found
