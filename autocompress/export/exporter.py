"""The file formats that a compressed model can be written in. Imports no torch.

An exporter is a stateless object, registered by name in `EXPORTERS`; `autocompress.export.formats`
imports them all. It refuses from shapes alone, before anything is written, what its format cannot
hold, so that a search space can be restricted to it too.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from autocompress.core import Allocation, LayerSpec, Scheme
from autocompress.core.errors import UsageError
from autocompress.core.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autocompress.export.manifest import Manifest
    from autocompress.methods import CompressedWeight
    from autocompress.models import BaseModel, ModelLayout


class Exporter(ABC):
    """Writes a compressed model in one file format.

    Attributes:
        name: what ``--format`` says.
        summary: one line.
        claims_bytes: the file weighs what the search claimed; else it weighs what its manifest
            says.
        tolerance: how far the retained quality of a reload may lie from the claim. The default is
            for formats that decode to the very matrices that were measured: the order of
            floating-point sums (threads, kernels) remains.
        modules: Python packages beyond our own dependencies that the format is written or loaded
            with.
        extra: the extra of this package that installs them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    claims_bytes: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-3
    modules: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""

    def refusal(self, layer: LayerSpec, scheme: Scheme) -> str:  # noqa: ARG002
        """Why the format cannot hold `layer` under `scheme`, from shapes alone; empty if it can.

        The rule, what was got, what is legal; without the layer's name. Any format holds the base
        scheme.
        """
        return ""

    def refusal_of_model(self, base: BaseModel) -> str:  # noqa: ARG002
        """Why the format cannot hold this model at all; empty if it can."""
        return ""

    @abstractmethod
    def write(
        self,
        base: BaseModel,
        weights: Mapping[str, CompressedWeight],
        out: Path,
        *,
        claim: Mapping[str, Any],
    ) -> Manifest:
        """Write the checkpoint; `out` appears complete or not at all.

        Args:
            base: model that was compressed; it is not changed.
            weights: by layer name. Layers that are absent, or have the base scheme, stay as they
                are.
            out: new or empty directory.
            claim: what was measured, for the manifest.

        Returns:
            The manifest that was written.

        Raises:
            UsageError: the format cannot hold a layer or the model; see `require`.
            RunDirectoryError: `out` is not empty or cannot be written.
        """

    def load(
        self,
        path: Path,
        *,
        dtype: str | torch.dtype | None,
        device: str,
        trust_remote_code: bool = False,
    ) -> nn.Module:
        """The model as the format's own client loads it, to be measured, in evaluation mode.

        Args:
            path: directory of the checkpoint.
            dtype: what to compute in; None for the checkpoint's own.
            device: torch device.
            trust_remote_code: run the model's own code, if it is made of such.

        Raises:
            CheckpointError: the checkpoint is missing or damaged, or its code may not run.
        """
        from autocompress.export.loading import load

        # Kernels round: what is claimed is measured as the search measured it.
        module: nn.Module = load(
            path,
            dtype=dtype,
            device=device,
            kernels="reference",
            trust_remote_code=trust_remote_code,
        )
        return module

    def stored_bytes(self, path: Path) -> int:
        """Bytes of all tensors in the weight files of a checkpoint, headers not counted.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        from autocompress.export.tensor_file import stored_bytes

        return stored_bytes(path)


EXPORTERS: Registry[Exporter] = Registry("export format")


def require(exporter: Exporter, layout: ModelLayout, allocation: Mapping[str, Scheme]) -> None:
    """Refuse what a format cannot hold.

    Args:
        exporter: of the format.
        layout: of the base model.
        allocation: scheme by layer name; layers that are absent stay as they are.

    Raises:
        UsageError: naming the first layer, the rule and the next step.
        ModelError: a name is no layer of the model.
    """
    refused = {
        name: reason
        for name, scheme in allocation.items()
        if not scheme.is_base and (reason := exporter.refusal(layout.layer(name), scheme))
    }
    if refused:
        name, reason = next(iter(refused.items()))
        more = f" ({len(refused) - 1} more layers are refused.)" if len(refused) > 1 else ""
        raise UsageError(
            f"{exporter.name} cannot hold layer {name}: {reason}{more} Next step: pick another "
            f"member, {_search_for(exporter)}or export --format packed, which holds every scheme."
        )


def _search_for(exporter: Exporter) -> str:
    """The search whose members all fit, if there is one."""
    from autocompress.export.targets import TARGETS

    names = [name for name in TARGETS if TARGETS[name].exporter == exporter.name]
    return f"search with --target {' or '.join(names)}, whose members all fit, " if names else ""


def require_model(exporter: Exporter, base: BaseModel) -> None:
    """Refuse a model that a format cannot hold at all.

    Raises:
        UsageError: the rule and the next step.
    """
    reason = exporter.refusal_of_model(base)
    if reason:
        raise UsageError(
            f"{exporter.name} cannot hold this model: {reason} Next step: export --format packed, "
            "which holds every model."
        )


def accepted(
    exporter: Exporter, base: BaseModel, weights: Mapping[str, CompressedWeight]
) -> dict[str, CompressedWeight]:
    """The layers that are compressed, if the format holds the model and each of them.

    Raises:
        UsageError: see `require_model` and `require`.
    """
    require_model(exporter, base)
    compressed = {name: w for name, w in weights.items() if not w.scheme.is_base}
    require(exporter, base.layout, {name: w.scheme for name, w in compressed.items()})
    return compressed


def dtype_refusal(base: BaseModel, legal: Collection[str]) -> str:
    """The first layer whose weights are of another dtype than a format holds; empty if none."""
    strange = next((layer for layer in base.layout.layers if layer.dtype not in legal), None)
    if strange is None:
        return ""
    return f"weights must be {' or '.join(legal)}, but those of {strange.name} are {strange.dtype}."


def require_packages(exporter: Exporter) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        UsageError: the package and how to install it.
    """
    missing = [name for name in exporter.modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"The format {exporter.name} needs the Python package {missing[0]}, which is not "
            f"installed here. Next step: pip install 'autocompress[{exporter.extra}]'."
        )


class Packed(Exporter):
    """Bit-packed integers, masks and factors."""

    name = "packed"
    summary = "as small as claimed; loads after `import autocompress`"
    claims_bytes = True

    def write(
        self,
        base: BaseModel,
        weights: Mapping[str, CompressedWeight],
        out: Path,
        *,
        claim: Mapping[str, Any],
    ) -> Manifest:
        """See `Exporter.write`."""
        from autocompress.export.packed import write_packed

        return write_packed(base, weights, out, claim=claim)


class Dense(Exporter):
    """Decoded weights in the base dtype."""

    name = "dense"
    summary = "decoded weights at full size, for any tool that loads the base model"

    def refusal(self, layer: LayerSpec, scheme: Scheme) -> str:  # noqa: ARG002
        """Rounded inputs cannot be said by weights."""
        from autocompress.methods import rounds_inputs

        if not rounds_inputs(scheme):
            return ""
        return f"plain weights cannot say that a layer rounds its inputs, but got {scheme}."

    def write(
        self,
        base: BaseModel,
        weights: Mapping[str, CompressedWeight],
        out: Path,
        *,
        claim: Mapping[str, Any],
    ) -> Manifest:
        """See `Exporter.write`."""
        from autocompress.export.dense import write_dense

        allocation = Allocation.of({name: weight.scheme for name, weight in weights.items()})
        dense = {name: weight.to_dense() for name, weight in weights.items()}
        return write_dense(base, dense, allocation, out, claim=claim)


EXPORTERS.add("packed", Packed())
EXPORTERS.add("dense", Dense())
