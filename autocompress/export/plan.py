"""What a packed checkpoint says about each of its layers, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autocompress.core import LayerSpec, Scheme, TensorLayout
from autocompress.core.errors import CheckpointError, SchemeError, UnknownNameError
from autocompress.core.layer import Kind
from autocompress.export.schema import require_version, validate

FORMAT_VERSION = 1
QUANT_METHOD = "autocompress"


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One compressed layer of a checkpoint.

    Attributes:
        name: fully qualified name of the module; its stored tensors are ``<name>.<tensor>``.
        scheme: how the stored tensors decode.
        shape: (out_features, in_features).
        dtype: of the base weight, and of stored plain values.
        kind: how the base module stored its weight.
        aliases: modules that compute with the same matrix (a tied head); nothing is stored for
            them.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    dtype: str
    kind: Kind
    aliases: tuple[str, ...] = ()

    @classmethod
    def of(cls, layer: LayerSpec, scheme: Scheme) -> PackedLayer:
        """The record of a layer compressed by `scheme`."""
        shape = (layer.out_features, layer.in_features)
        return cls(layer.name, scheme, shape, layer.dtype, layer.kind, layer.aliases)

    def tensors(self) -> Mapping[str, TensorLayout]:
        """Shape and dtype of every stored tensor, by name within the layer.

        Raises:
            CheckpointError: the layer cannot take the scheme.
        """
        from autocompress.methods import footprint  # registers while transformers still loads

        layer = LayerSpec(
            name=self.name,
            role="other",
            block=None,
            out_features=self.shape[0],
            in_features=self.shape[1],
            kind=self.kind,
            dtype=self.dtype,
            input_name=None,
            macs_per_token=0,
            aliases=self.aliases,
        )
        try:
            return footprint(layer, self.scheme).tensors
        except (SchemeError, UnknownNameError) as error:
            raise CheckpointError(
                f"Layer {self.name} of the checkpoint has a scheme that this version cannot read: "
                f"{error} Next step: load it with the version of autocompress that wrote it, or "
                "export it again."
            ) from error

    def to_json(self) -> dict[str, Any]:
        """The layer's entry in `quantization_config.layers`."""
        return {
            "scheme": str(self.scheme),
            "shape": list(self.shape),
            "dtype": self.dtype,
            "kind": self.kind,
            "aliases": list(self.aliases),
        }


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """All compressed layers of a checkpoint, and the dtype that the base model is stored in.

    Attributes:
        dtype: of the base model.
        layers: the compressed ones.
        separate_experts: each expert's tensors are stored under a name of their own, compressed or
            not, instead of slices of one stacked tensor.
    """

    dtype: str
    layers: tuple[PackedLayer, ...]
    separate_experts: bool = False

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` object of config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "version": FORMAT_VERSION,
            "dtype": self.dtype,
            "layers": {layer.name: layer.to_json() for layer in self.layers},
            **({"separate_experts": True} if self.separate_experts else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PackedPlan:
        """Read a `quantization_config` that anyone may have written.

        Raises:
            CheckpointError: it is malformed, or of a newer format version.
        """
        where = "quantization_config in config.json"
        require_version(data, "version", FORMAT_VERSION, where)
        validate(data, "quantization_config", where)
        layers = tuple(_layer(n, entry) for n, entry in data["layers"].items())
        return cls(data["dtype"], layers, data.get("separate_experts", False))


def _layer(name: str, entry: Mapping[str, Any]) -> PackedLayer:
    try:
        scheme = Scheme.parse(entry["scheme"])
    except SchemeError as error:
        raise CheckpointError(f"Layer {name} of the checkpoint: {error}") from error
    rows, columns = entry["shape"]
    return PackedLayer(
        name, scheme, (rows, columns), entry["dtype"], entry["kind"], tuple(entry["aliases"])
    )
