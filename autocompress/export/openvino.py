"""OpenVINO models: Intel's runtime for CPUs, and what is built on it. Imports no torch.

The graph is that of the base model, its compressed layers are the codes and scales of the search
in the form that OpenVINO has int4 and int8 kernels for (`openvino_weights`), and causal language
models keep their cache (`openvino_graph`). Files are named as optimum-intel and openvino-genai
name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from autocompress.core import Allocation, LayerSpec, Scheme
from autocompress.core.errors import CheckpointError
from autocompress.export.exporter import (
    EXPORTERS,
    Exporter,
    accepted,
    dtype_refusal,
    require_packages,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autocompress.export.manifest import Manifest
    from autocompress.methods import CompressedWeight
    from autocompress.models import BaseModel

MODEL_FILE, WEIGHTS_FILE = "openvino_model.xml", "openvino_model.bin"


class OpenVino(Exporter):
    """A graph and its constants."""

    name = "openvino"
    summary = "int4 and int8 layers for OpenVINO on CPUs; codes as they were measured"
    modules = ("openvino",)
    extra = "openvino"
    # The client computes in float32; weights of bfloat16 models are not rounded to bfloat16 again.
    tolerance = 5e-3

    def refusal(self, layer: LayerSpec, scheme: Scheme) -> str:
        """See `Exporter.refusal`."""
        if scheme.is_base:
            return ""
        from autocompress.export.openvino_weights import refusal

        return refusal((layer.out_features, layer.in_features), layer.dtype, scheme)

    def refusal_of_model(self, base: BaseModel) -> str:
        """Encoders and decoders, but not both in one, without experts; 16 or 32 bits."""
        from autocompress.export.openvino_forms import CAUSAL, attention_refusal
        from autocompress.export.openvino_weights import FLOATS

        config: Any = base.module.config
        if getattr(config, "is_encoder_decoder", False):
            return (
                "it holds one graph, an encoder or a decoder, but an encoder-decoder like "
                f"{config.model_type} needs two."
            )
        if any(layer.expert is not None for layer in base.layout.layers):
            return (
                "all tokens must take one way through the graph, but this mixture of experts "
                "sends each to some."
            )
        if refusal := dtype_refusal(base, FLOATS):
            return refusal
        return attention_refusal(config) if base.auto_class == CAUSAL else ""

    def write(
        self,
        base: BaseModel,
        weights: Mapping[str, CompressedWeight],
        out: Path,
        *,
        claim: Mapping[str, Any],
    ) -> Manifest:
        """See `Exporter.write`; the manifest's notes give the type of each layer's codes.

        Raises:
            CheckpointError: what OpenVINO computes from the written file is not what torch
                computes with the same weights.
        """
        require_packages(self)
        from autocompress.export.directory import new_directory
        from autocompress.export.openvino_writing import check_written, write_model
        from autocompress.export.writing import finish
        from autocompress.models.quiet import quiet_transformers

        weights = accepted(self, base, weights)
        allocation = Allocation.of({name: weight.scheme for name, weight in weights.items()})
        with new_directory(out) as directory:
            with quiet_transformers():
                module = cast(Any, base.module)
                module.config.save_pretrained(directory)
                if module.can_generate():
                    module.generation_config.save_pretrained(directory)
            model, form, notes = write_model(base, weights, directory / MODEL_FILE)
            check_written(model, form, base, weights, directory)
            return finish(
                directory,
                base,
                allocation=allocation,
                claim=claim,
                checkpoint_format=self.name,
                notes=notes,
                foreign_bytes=self.stored_bytes(directory),
            )

    def load(
        self,
        path: Path,
        *,
        dtype: str | torch.dtype | None,  # noqa: ARG002
        device: str,  # noqa: ARG002
        trust_remote_code: bool = False,
    ) -> nn.Module:
        """See `Exporter.load`: OpenVINO on the CPU in float32, whatever is asked for."""
        require_packages(self)
        from autocompress.export.openvino_client import load_openvino

        return load_openvino(path, trust_remote_code=trust_remote_code)

    def stored_bytes(self, path: Path) -> int:
        """See `Exporter.stored_bytes`: the file of constants has nothing else in it."""
        try:
            return (path / WEIGHTS_FILE).stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{path / WEIGHTS_FILE} cannot be read: {error.strerror}. Next step: copy or "
                "export it again."
            ) from error


EXPORTERS.add(OpenVino.name, OpenVino())
