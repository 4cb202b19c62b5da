"""What an error in a layer's weight does to the task, to second order.

With g the gradient of the task's summed loss (labels drawn from the model itself) with respect to a
layer's outputs, an error D of its weight W damages the model per token or example by about
``1/2 sum_r E[(sum_t g_tr D_r x_t)^2]``, t the tokens of a sequence, cross terms between outputs r
left out. With ``G_r = sum_t g_tr x_t`` that takes ``E[G_r G_r^T]`` of each output, o matrices, so
it is written as ``f_r H`` with the true sum over outputs and the true trace of each. The unweighted
``E[x x^T]`` will not do: attention sinks have huge inputs and hardly any gradient. Nor may the
tokens be taken one by one: an error hits all of them alike, and where the answer is a mean over
tokens, a sequence of them does many times the damage (compare K-FAC-reduce and K-FAC-expand,
Eschenhagen et al. 2023, arXiv 2311.00636).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autocompress.core import LayerSpec, digest, digest_bytes
from autocompress.core.errors import ModelError
from autocompress.methods import LayerStatistics
from autocompress.models.calibration import TensorFiles

_FORMAT = "layer curvature 2"
_ROWS = "rows."
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True, eq=False)
class Lookup:
    """Curvature of a table of which each token reads one row.

    An error ``D_v`` of row v changes what its readers get by ``g . D_v``, g the gradient that
    reached them: gradients take the place that inputs have where a layer multiplies.

    Attributes:
        rows: gradient energy that reached each row, per unit of the damage, (o,) float32.
        hessian: ``E[g g^T]`` over all reads, of trace 1, (d, d) float32.
        statistics: the same for methods, every read weighted by a tempered energy, (d, d) float32.
        n_reads: reads that a gradient reached.
    """

    rows: Tensor
    hessian: Tensor
    statistics: Tensor
    n_reads: int


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """What the damage of an error in one layer is predicted from.

    Attributes:
        rows: f, gradient energy of each output per unit that the damage averages, (o,) float32;
            None if the layer multiplies nothing (an embedding that is not the head).
        hessian: H, second moment of the inputs weighted by gradients, (d, d) float32; None if there
            is none, or no gradient reached the layer, which then damages nothing.
        lookup: of an embedding.
        digest: of the content.
    """

    rows: Tensor | None
    hessian: Tensor | None
    lookup: Lookup | None
    digest: str

    @property
    def forms(self) -> list[tuple[Tensor, Tensor]]:
        """(f, H) of all ways in which an error reaches the outputs."""
        found = [] if self.lookup is None else [(self.lookup.rows, self.lookup.hessian)]
        if self.rows is not None and self.hessian is not None:
            found.append((self.rows, self.hessian))
        return found


def predicted_damage(weight: Tensor, dense: Tensor, curvature: LayerCurvature) -> float:
    """Damage of `dense` (o, d) in place of `weight` (o, d), in the unit of the task's damage.

    ``1/2 sum_r f_r (D H D^T)_rr`` with ``D = dense - weight``; of an embedding also with f and H of
    its lookups. Products in float32 (float64 for float64 weights), sums in float64; NaN or infinity
    where D is not finite.
    """
    return predicted_damages(weight, [dense], curvature)[0]


def predicted_damages(
    weight: Tensor, candidates: Iterable[Tensor], curvature: LayerCurvature
) -> list[float]:
    """`predicted_damage` of each candidate; they may be made one after the other."""
    return [_damage(weight, dense, curvature) for dense in candidates]


def _damage(weight: Tensor, dense: Tensor, curvature: LayerCurvature) -> float:
    total = torch.zeros((), dtype=torch.float64)
    size = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for start in range(0, weight.shape[0], size):
        part = slice(start, start + size)
        difference = dense[part].to(dtype) - weight[part].to(dtype)
        total += _damage_of_rows(difference, part, curvature).cpu()
    return 0.5 * float(total)


def _damage_of_rows(difference: Tensor, part: slice, curvature: LayerCurvature) -> Tensor:
    """Twice the damage of some rows of D, a float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=difference.device)
    for rows, hessian in curvature.forms:
        errors = ((difference @ hessian.to(difference)) * difference).sum(1)
        # H is positive semidefinite; what rounding leaves below 0 is none
        errors = errors.double().clamp(min=0)
        total = total + rows[part].to(errors) @ errors
    return total


@dataclass(frozen=True, eq=False)
class InputCurvature:
    """What one pass gathered about one distinct layer input.

    Attributes:
        hessian: H weighted by gradient energy, (d, d) float32; None if no gradient came.
        statistics: second moment for methods, every token weighted by a tempered gradient energy,
            (d, d) float32; None if no gradient came.
        energies: squared gradient norm of each token, summed over the layers that read the input,
            (n,) float32, in the order of the batches.
        rows: f of each layer that reads the input, (o,) float32.
    """

    hessian: Tensor | None
    statistics: Tensor | None
    energies: Tensor
    rows: Mapping[str, Tensor]

    @property
    def n_tokens(self) -> int:
        """Tokens with any weight at all.

        Not Kish's effective size, which says less of how H should be shrunk: layers whose tokens
        count very unequally want no larger ridge than others (`benchmarks/few_tokens.py`).
        """
        return int((self.energies > 0).sum())


class CurvatureStore:
    """A folder with one file per distinct layer input and per embedding.

    As `StatisticsStore`: atomic, memory-mapped, damaged files count as absent with a warning.

    Args:
        root: folder for one triple of model, calibration tokens and kind of labels. The caller
            names it by their digests.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files = TensorFiles(root, _FORMAT, "Layer curvature")

    def is_sound(self, name: str) -> bool:
        """Whether an input (or ``lookup:LAYER``) is here and its content is what was written."""
        header = self._files.header(name)
        if header is None:
            return False
        if _content_digest(self._files.tensors(name)) == header["digest"]:
            return True
        self._files.warn_damaged(self._files.path(name), "the checksum differs")
        return False

    def get(self, layer: LayerSpec) -> LayerCurvature:
        """The curvature of a layer.

        Raises:
            ModelError: it was not collected.
        """
        digests: list[str] = []
        rows, hessian, lookup = None, None, None
        if layer.input_name is not None:
            digests.append(self._header(layer, layer.input_name)["digest"])
            tensors = self._files.tensors(layer.input_name)
            rows, hessian = tensors[_ROWS + layer.name], tensors.get("hessian")
        if layer.kind == "embedding":
            name = lookup_name(layer)
            header = self._header(layer, name)
            digests.append(header["digest"])
            lookup = Lookup(**self._files.tensors(name), n_reads=int(header["n_reads"]))
        return LayerCurvature(rows, hessian, lookup, digest([layer.name, *digests]))

    def statistics(self, layer: LayerSpec) -> LayerStatistics:
        """Statistics of the layer's input with tokens weighted by gradient energy, for methods.

        An embedding has those of the gradients that reach its rows; as the head, too, a mean of
        both by what errors damage in either place.

        Raises:
            ModelError: they were not collected.
        """
        if layer.kind == "embedding":
            return self._of_table(layer)
        if layer.input_name is None:
            return LayerStatistics.none()
        header = self._header(layer, layer.input_name)
        hessian = self._files.tensors(layer.input_name).get("statistics")
        identity = digest(["by gradient", header["digest"]])
        return LayerStatistics.sampled(hessian, int(header["n_tokens"]), identity)

    def _of_table(self, layer: LayerSpec) -> LayerStatistics:
        found = self.get(layer)
        assert found.lookup is not None  # of an embedding
        counted = [(found.lookup.rows, found.lookup.statistics)]
        n_tokens = found.lookup.n_reads
        if layer.input_name is not None and found.rows is not None and found.hessian is not None:
            as_head = self._files.tensors(layer.input_name)["statistics"]
            counted.append((found.rows * found.hessian.trace(), as_head))
            n_tokens = max(n_tokens, int(self._header(layer, layer.input_name)["n_tokens"]))
        energies = [float(rows.sum(dtype=torch.float64)) for rows, _ in counted]
        total = sum(energies)
        if not total:
            return LayerStatistics.none()
        hessian = sum(
            (energy / total / float(own.trace())) * own
            for energy, (_, own) in zip(energies, counted, strict=True)
            if energy
        )
        assert isinstance(hessian, Tensor)  # there is energy
        return LayerStatistics.sampled(hessian, n_tokens, digest(["table", found.digest]))

    def energies(self, layer: LayerSpec) -> Tensor:
        """Weight of each calibration token in the layer's H, (n,) float32, not normalised.

        In the order of the batches, padding left out, as `TokenMasks` says.

        Raises:
            ModelError: they were not collected, or the layer reads no activations.
        """
        name = layer.input_name or layer.name
        self._header(layer, name)
        return self._files.tensors(name)["energies"]

    def put(self, input_name: str, found: InputCurvature) -> None:
        """Write what was found about an input.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        tensors = {"energies": found.energies}
        tensors |= {_ROWS + name: rows for name, rows in found.rows.items()}
        if found.hessian is not None and found.statistics is not None:
            tensors |= {"hessian": found.hessian, "statistics": found.statistics}
        self._write(input_name, tensors, n_tokens=found.n_tokens)

    def put_lookup(self, layer: LayerSpec, found: Lookup) -> None:
        """Write what was found about an embedding as a table.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        tensors = {name: getattr(found, name) for name in ("rows", "hessian", "statistics")}
        self._write(lookup_name(layer), tensors, n_reads=found.n_reads)

    @property
    def digest(self) -> str:
        """Digest of everything stored: equal content, equal digest."""
        return digest(sorted([h["name"], h["digest"]] for h in self._files.headers()))

    def _write(self, name: str, tensors: Mapping[str, Tensor], **about: object) -> None:
        stored = {key: tensor.contiguous() for key, tensor in tensors.items()}
        header = {key: str(value) for key, value in about.items()}
        content = _content_digest(stored)
        self._files.write(name, stored, {"name": name, "digest": content, **header})

    def _header(self, layer: LayerSpec, name: str) -> dict[str, str]:
        header = self._files.header(name)
        if header is None:
            raise ModelError(
                f"Layer {layer.name!r} needs the curvature of {name!r}, which is not in "
                f"{self.root}. Run collect_curvature with this layer first."
            )
        return header


def lookup_name(layer: LayerSpec) -> str:
    """Name in the store of an embedding as a table."""
    return f"lookup:{layer.name}"


def _content_digest(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return digest([[name, digest_bytes(tensors[name].numpy().data.cast("B"))] for name in names])
