"""What passes over calibration tokens share: layer inputs, windows of them, and their files."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autocompress.core import digest
from autocompress.core.errors import RunDirectoryError
from autocompress.models.experts import Routed
from autocompress.models.layout import ModelLayout

_log = logging.getLogger(__name__)

_NAMED = 3
_ACCUMULATOR_BYTES = 8  # sums over batches are kept in float64

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class LayerInput:
    """A distinct layer input: the layer that names it, its width and where it is read."""

    name: str
    width: int
    block: int | None
    reads_encoder_output: bool

    @property
    def n_bytes(self) -> int:
        """Of one accumulator of second moments."""
        return _ACCUMULATOR_BYTES * self.width**2


def wanted_inputs(layout: ModelLayout, layers: Collection[str] | None) -> list[LayerInput]:
    """Distinct inputs in execution order: the blocks first, then what follows them.

    Args:
        layout: of the model.
        layers: names of the layers whose inputs are wanted; None for all.

    Raises:
        ModelError: a layer name is unknown.
    """
    chosen = layout.layers if layers is None else [layout.layer(name) for name in layers]
    names = {layer.input_name for layer in chosen}
    inputs: dict[str, LayerInput] = {}
    for layer in layout.layers:
        name = layer.input_name
        if name is not None and name in names and name not in inputs:
            crossed = layer.role in ("cross_key", "cross_value")
            inputs[name] = LayerInput(name, layer.in_features, layer.block, crossed)
    after = len(layout.blocks)
    return sorted(inputs.values(), key=lambda item: after if item.block is None else item.block)


def windows(inputs: Sequence[LayerInput], budget: int) -> Iterator[list[LayerInput]]:
    """Cut into runs of consecutive inputs whose accumulators fit the budget, or single inputs."""
    window: list[LayerInput] = []
    for item in inputs:
        if window and sum(i.n_bytes for i in window) + item.n_bytes > budget:
            yield window
            window = []
        window.append(item)
    if window:
        yield window


def token_rows(activations: Tensor, mask: Tensor | None, routed: Routed | None = None) -> Tensor:
    """(n, d) rows of the tokens that count, of activations (..., d).

    A mask of another shape than the leading axes does not speak about these rows (pooled vectors,
    image patches, sequences that the model itself has unpadded): then all count.

    Args:
        activations: of a layer.
        mask: (sequences, tokens) True for tokens that count; None if all do.
        routed: which tokens the rows are, if the layer belongs to an expert.
    """
    if routed is not None:
        mask = routed.counting(mask)
    elif mask is not None and activations.ndim == 2 and mask.numel() == len(activations):
        mask = mask.reshape(-1)  # a block that joins all sequences
    if mask is not None and mask.shape == activations.shape[:-1]:
        return activations[mask]
    return activations.reshape(-1, activations.shape[-1])


def sequence_rows(
    values: Tensor, mask: Tensor | None, n_sequences: int, routed: Routed | None = None
) -> list[Tensor]:
    """The rows (n, d) of the tokens that count, sequence by sequence, of values (batch, ..., d).

    Without a token axis (pooled vectors) every row is a sequence.

    Args:
        values: of a layer, or gradients of such.
        mask: (sequences, tokens) True for tokens that count; None if all do.
        n_sequences: of the batch.
        routed: which tokens the rows are, if the layer belongs to an expert.
    """
    if routed is not None:
        return _routed_rows(values, mask, n_sequences, routed)
    if mask is not None and values.ndim == 2 and mask.numel() == len(values) > len(mask):
        values = values.reshape(*mask.shape, values.shape[-1])  # a block that joins all sequences
    if mask is not None and mask.shape != values.shape[:-1]:
        mask = None
    masks = [None] * len(values) if mask is None else list(mask)
    return [token_rows(one, m) for one, m in zip(values, masks, strict=True)]


def _routed_rows(
    values: Tensor, mask: Tensor | None, n_sequences: int, routed: Routed
) -> list[Tensor]:
    counting, sequences = routed.counting(mask), routed.sequences(n_sequences)
    if counting is not None:
        values = values[counting]
        sequences = None if sequences is None else sequences[counting]
    if sequences is None:
        return list(torch.split(values, 1))
    return list(torch.split(values, torch.bincount(sequences, minlength=n_sequences).tolist()))


class TensorFiles:
    """A folder with one safetensors file per name, each with text about it.

    Files appear by atomic rename, so any number of workers may read while one process writes. A
    file that is damaged or of another format counts as absent and is named in a warning.

    Args:
        root: the folder.
        file_format: what the files hold and its version.
        what: the same for people, capitalised, e.g. ``Layer statistics``.
    """

    def __init__(self, root: Path, file_format: str, what: str) -> None:
        self.root = root
        self.file_format = file_format
        self.what = what

    def path(self, name: str) -> Path:
        """The file of `name`."""
        return self.root / f"{digest(name)}.safetensors"

    def header(self, name: str) -> dict[str, str] | None:
        """The text of a file; None if it is absent or, with a warning, damaged."""
        path = self.path(name)
        return self._read_header(path) if path.exists() else None

    def headers(self) -> Iterator[dict[str, str]]:
        """The text of every sound file."""
        for path in self.root.glob("*.safetensors"):
            header = self._read_header(path)
            if header is not None:
                yield header

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of a file, memory-mapped."""
        with safe_open(self.path(name), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def warn_damaged(self, path: Path, reason: object) -> None:
        """Say that a file cannot be used and what is done instead."""
        _log.warning("%s in %s are damaged (%s); collecting again.", self.what, path, reason)

    def write(self, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
        """Write a file so that a reader sees all of it or nothing.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        path = self.path(name)
        partial = path.with_name(f".{path.stem}.{os.getpid()}.{uuid.uuid4().hex}.partial")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), partial, {"format": self.file_format, **header})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise RunDirectoryError(
                f"{self.what} must be written to {self.root}, but that failed: {error}. "
                "Free some space or choose another folder."
            ) from error

    def _read_header(self, path: Path) -> dict[str, str] | None:
        try:
            with safe_open(path, framework="pt") as file:
                header: dict[str, str] = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            self.warn_damaged(path, error)
            return None
        return header if header.get("format") == self.file_format else None


def layers_in_words(names: Sequence[str]) -> str:
    """At least one name, the first few of many: a mixture has thousands of experts."""
    shown = ", ".join(map(repr, names[:_NAMED]))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"layer{'s' if len(names) > 1 else ''} {shown}{more}"


def second_moment(rows: Tensor) -> Tensor:
    """``sum x x^T`` of (n, d) rows of any float dtype: (d, d), multiplied in float32 or better."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.T @ rows
