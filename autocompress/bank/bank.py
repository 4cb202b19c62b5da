"""The layer bank: every layer under every scheme is compressed once, then read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autocompress.bank.filling import (
    Job,
    Progress,
    Stopped,
    is_large,
    one_torch_thread,
    run_jobs,
    shares,
)
from autocompress.bank.keys import Keys, Layers
from autocompress.bank.lru import ByteLru
from autocompress.bank.resident import ResidentStatistics
from autocompress.bank.store import EntryStore
from autocompress.core import LayerSpec, Scheme
from autocompress.core.errors import ModelError
from autocompress.methods import (
    CompressedWeight,
    InputMap,
    LayerProblem,
    LayerStatistics,
    Needs,
    canonical,
    compress,
    compress_together,
    decode,
    input_map,
    needs,
    rounds_inputs,
)

DEFAULT_DENSE_BYTES = 1 << 30
DEFAULT_PROBLEM_BYTES = 512 << 20
DEFAULT_FALLBACK_BYTES = 1 << 30
_HESSIAN_COPIES = 4  # H and its factors for the orders and dampings in use


class Bank:
    """Read-through store of packed layers, addressed by content.

    The key of an entry is the digest of what it is made of (see `Keys`), so a directory may be
    shared by models, calibrations, processes and runs. What it cannot hold is kept in memory.
    Workers that share a directory never compress the same entry twice: whoever builds holds a lock
    on the layer, which the system releases if it dies. Layers that share are built together.

    Args:
        root: directory of the entries, ``<root>/<aa>/<digest>.safetensors``.
        layout: the model's layers.
        weights: base weights (o, d) by layer name, in the checkpoint's dtype; never written.
        statistics: calibration statistics of a layer; asked only for schemes that need them.
        capacity_bytes: bound on the directory; the entries used longest ago make room, and one
            that alone exceeds it is kept in memory. None for a generous default (see `Shelf`).
        dense_bytes: memory for decoded matrices.
        problem_bytes: memory for decompositions that the options of a layer share.
        fallback_bytes: memory for packed entries when the directory cannot be written.

    Attributes:
        given: layers that are not compressed here, by name; see `with_given`.
    """

    def __init__(
        self,
        root: Path,
        layout: Layers,
        weights: Mapping[str, Tensor],
        statistics: Callable[[LayerSpec], LayerStatistics],
        *,
        capacity_bytes: int | None = None,
        dense_bytes: int = DEFAULT_DENSE_BYTES,
        problem_bytes: int = DEFAULT_PROBLEM_BYTES,
        fallback_bytes: int = DEFAULT_FALLBACK_BYTES,
    ) -> None:
        self.root = root
        self.layout = layout
        self._weights = weights
        self._statistics = statistics
        self._capacity_bytes = capacity_bytes
        self.given: Mapping[str, CompressedWeight] = {}
        self._limits = (dense_bytes, problem_bytes, fallback_bytes)
        self._start_empty()

    def _start_empty(self) -> None:
        dense_bytes, problem_bytes, fallback_bytes = self._limits
        self._dense: ByteLru[tuple[str, Scheme, torch.dtype], Tensor]
        self._dense = ByteLru(dense_bytes, lambda matrix: matrix.nbytes)
        self._problems: ByteLru[tuple[str, str], LayerProblem]
        self._problems = ByteLru(problem_bytes, _problem_bytes)
        self._store = EntryStore(self.root, self._capacity_bytes, fallback_bytes)
        self._keys = Keys(self.layout, self._weights, self._statistics)
        self._notes: dict[tuple[str, Scheme], tuple[str, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: no caches."""
        kept = ("root", "layout", "_weights", "_statistics", "_capacity_bytes", "_limits", "given")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    @property
    def capacity_bytes(self) -> int:
        """Bound on the directory."""
        return self._store.capacity()

    def packed(self, name: str, scheme: Scheme) -> CompressedWeight:
        """The compressed weight of a layer, from the directory or compressed now.

        Raises:
            ModelError: the model has no such layer.
            SchemeError: the layer cannot take the scheme.
        """
        layer = self.layout.layer(name)
        scheme = canonical(scheme)
        if self._is_given(name, scheme):
            return self.given[name]
        key = self._keys.key(layer, scheme)
        entry = self._store.find(key, name, scheme)
        if entry is None:
            with self._store.building(self._keys.lock_name(layer, scheme)):
                entry = self._store.find(key, name, scheme) or self._make(key, layer, scheme)
        self._notes[name, scheme] = entry.notes
        return entry

    def fill(
        self,
        wanted: Mapping[str, Sequence[Scheme]],
        *,
        n_threads: int = 1,
        progress: Progress | None = None,
    ) -> None:
        """Build what the directory lacks, layer by layer, so that options share decompositions.

        Layers that another worker is building are waited for last.

        Args:
            wanted: schemes by layer name; the base scheme is passed over.
            n_threads: layers at the same time, each with one torch thread.
            progress: told about every finished layer.

        Raises:
            ModelError: the model has no such layer, or lacks its statistics.
            SchemeError: a layer cannot take a scheme.
        """
        jobs = [job for name, schemes in wanted.items() for job in self._jobs(name, schemes)]
        run_jobs(jobs, self._attempt, n_threads=n_threads, progress=progress)

    def fill_by_layer(
        self, wanted: Mapping[str, Sequence[Scheme]], *, n_threads: int = 1
    ) -> Generator[str, None, None]:
        """As `fill`, in the order of the layers, telling the name of each that is done.

        A layer is compressed by one torch thread, unless it is so large that it has memory and all
        threads for itself: what is stored does not depend on how many layers are done at a time.

        Args:
            wanted: schemes by layer name.
            n_threads: layers at the same time, if memory holds them.

        Raises:
            ModelError, SchemeError: as `fill`.
        """
        for share in shares(map(self.layout.layer, wanted), n_threads):
            names = [layer.name for layer in share]
            with nullcontext() if is_large(share[0]) else one_torch_thread():
                self.fill({name: wanted[name] for name in names}, n_threads=len(share))
            yield from names

    def prepare(self, allocation: Mapping[str, Scheme]) -> None:
        """Build what an allocation lacks, before its layers are asked for one by one.

        Workers that start cold on one allocation share its layers instead of queueing at each.
        """
        unread = {
            name: (scheme,)
            for name, scheme in allocation.items()
            if (name, canonical(scheme)) not in self._notes
        }
        self.fill(unread)

    def dense(self, name: str, scheme: Scheme, dtype: torch.dtype) -> Tensor:
        """The decoded matrix (o, d) of a layer in `dtype`, on the device of the base weight.

        Shared between calls: never write it.
        """
        scheme = canonical(scheme)
        key = (name, scheme, dtype)
        matrix = self._dense.get(key)
        if matrix is None:
            device = self._weights[name].device
            packed = self.packed(name, scheme).to(device)  # few bytes go to a GPU, decoded there
            # Straight to `dtype`, as a loaded checkpoint decodes: through the base dtype it would
            # be rounded once more, and a reload would not compute what was measured.
            matrix = decode(packed.tensors, packed.scheme, packed.shape, dtype).to(device)
            self._dense.put(key, matrix)
        return matrix

    def input_maps(self, allocation: Mapping[str, Scheme]) -> dict[str, InputMap]:
        """What becomes of the inputs of the layers whose scheme rounds them, by layer name."""
        maps: dict[str, InputMap] = {}
        for name, scheme in allocation.items():
            if rounds_inputs(scheme):
                packed = self.packed(name, scheme).to(self._weights[name].device)
                mapped = input_map(packed.tensors, canonical(scheme))
                assert mapped is not None  # the scheme rounds
                maps[name] = mapped
        return maps

    def notes(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """What the methods said when the layer was compressed, e.g. a fallback and its reason."""
        scheme = canonical(scheme)
        if self._is_given(name, scheme):
            return self.given[name].notes
        if (name, scheme) not in self._notes:
            self.packed(name, scheme)
        return self._notes[name, scheme]

    def with_resident_statistics(self) -> Bank:
        """A bank that holds its statistics in memory, for a machine without their files.

        Layers whose statistics were not collected have none there either.
        """
        found: dict[str, LayerStatistics] = {}
        by_digest: dict[str, LayerStatistics] = {}
        for name in self._weights:
            with suppress(ModelError):
                statistics = self._statistics(self.layout.layer(name))
                found[name] = by_digest.setdefault(statistics.digest, statistics)
        return self.with_statistics(ResidentStatistics(found))

    def statistics(self, layer: LayerSpec) -> LayerStatistics:
        """The statistics that the layer is compressed with; `ModelError` if there are none."""
        return self._statistics(layer)

    def with_statistics(self, statistics: Callable[[LayerSpec], LayerStatistics]) -> Bank:
        """A bank over the same directory and weights that compresses with other statistics."""
        return self._with(_statistics=statistics)

    def with_given(self, given: Mapping[str, CompressedWeight]) -> Bank:
        """A bank that has these layers, under the schemes that they name, from elsewhere."""
        return self._with(given=dict(given))

    def _with(self, **changed: object) -> Bank:
        """A bank that differs in this; a subclass stays what it is, caches are left behind."""
        other = object.__new__(type(self))
        other.__setstate__(self.__getstate__() | changed)
        return other

    def _is_given(self, name: str, scheme: Scheme) -> bool:
        return name in self.given and self.given[name].scheme == scheme

    def forget_dense(self) -> None:
        """Drop all decoded matrices, e.g. because one of them was written to."""
        self._dense.clear()

    def path(self, name: str, scheme: Scheme) -> Path:
        """The file that holds, or would hold, a layer under a scheme."""
        return self._store.path(self._keys.key(self.layout.layer(name), canonical(scheme)))

    def _jobs(self, name: str, schemes: Sequence[Scheme]) -> list[Job]:
        layer = self.layout.layer(name)
        by_lock: dict[str, list[Scheme]] = {}
        for scheme in dict.fromkeys(map(canonical, schemes)):
            if not scheme.is_base and not self._is_given(name, scheme):
                by_lock.setdefault(self._keys.lock_name(layer, scheme), []).append(scheme)
        return [Job(layer, tuple(group), lock) for lock, group in by_lock.items()]

    def _attempt(self, job: Job, wait: bool, stopped: Stopped) -> bool:
        """Build what a job lacks; False if another worker holds its lock and we do not wait."""
        keys = {self._keys.key(job.layer, scheme): scheme for scheme in job.schemes}
        if all(map(self._store.holds, keys)):
            return True
        with self._store.building(job.lock, wait=wait) as held:
            if held:
                for key, scheme in keys.items():
                    if stopped():
                        break
                    if not self._store.holds(key):
                        self._make(key, job.layer, scheme)
            return held

    def _make(self, key: str, layer: LayerSpec, scheme: Scheme) -> CompressedWeight:
        """Compress a layer and keep the result; the caller holds the lock.

        Layers that share are kept together, so that what they share is of one making.
        """
        sharing = self._keys.sharing(layer, scheme)
        if len(sharing) == 1:
            return self._store.keep(key, layer.name, self._build(layer, scheme))
        problems = [self._problem(one, needs(scheme)) for one in sharing]
        entries = compress_together(
            [self._weights[one.name] for one in sharing],
            scheme,
            [problem.statistics for problem in problems],
            problems=problems,
        )
        kept = [
            self._store.keep(self._keys.key(one, scheme), one.name, entry)
            for one, entry in zip(sharing, entries, strict=True)
        ]
        return kept[sharing.index(layer)]

    def _build(self, layer: LayerSpec, scheme: Scheme) -> CompressedWeight:
        weight = self._weights[layer.name]
        problem, read = self._problem(layer, needs(scheme)), self._keys.reader(layer, scheme)
        reader = None if read is None else self._problem(read, needs(scheme))
        return compress(weight, scheme, problem.statistics, problem=problem, reader=reader)

    def _problem(self, layer: LayerSpec, need: Needs) -> LayerProblem:
        uses_statistics = need is not Needs.NONE
        statistics = self._statistics(layer) if uses_statistics else LayerStatistics.none()
        key = (layer.name, statistics.digest)
        problem = self._problems.get(key)
        if problem is None:
            problem = LayerProblem(self._weights[layer.name], statistics)
            self._problems.put(key, problem)
        return problem


def _problem_bytes(problem: LayerProblem) -> int:
    hessian = problem.statistics.hessian
    of_statistics = 0 if hessian is None else hessian.nbytes
    o, d = problem.weight.shape
    of_spectra = 2 * 8 * o * min(o, d)
    return problem.weight.nbytes + _HESSIAN_COPIES * of_statistics + of_spectra
