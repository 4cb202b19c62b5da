"""GGUF files: what llama.cpp, and transformers with ``gguf_file=``, load. Imports no torch.

Codes and scales are those of the search, moved into GGUF's blocks, which decode to the very matrix
that was measured; `gguf_blocks` says which schemes have a block type. Schemes that have none are
refused by ``gguf``; ``gguf-nearest`` quantizes them again, which changes the model. Beside the file
lie config.json, generation_config.json and the tokenizer, for clients that read them rather than
the file's metadata.
"""

from __future__ import annotations

from collections import Counter
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

    from autocompress.export.gguf_blocks import Target
    from autocompress.export.manifest import Manifest
    from autocompress.methods import CompressedWeight
    from autocompress.models import BaseModel

GGUF_FILE = "model.gguf"


class Gguf(Exporter):
    """A GGUF file that holds the codes of the search."""

    name = "gguf"
    summary = "one file for llama.cpp and transformers; codes as they were measured"
    modules = ("gguf", "accelerate")
    extra = "gguf"

    def target(self, layer: LayerSpec, scheme: Scheme) -> Target:
        """The GGUF type of a layer under a scheme, or why there is none."""
        from autocompress.export.gguf_blocks import exact_target

        return exact_target((layer.out_features, layer.in_features), layer.dtype, scheme)

    def refusal(self, layer: LayerSpec, scheme: Scheme) -> str:
        """See `Exporter.refusal`."""
        return "" if scheme.is_base else self.target(layer, scheme).refusal

    def refusal_of_model(self, base: BaseModel) -> str:
        """See `Exporter.refusal_of_model`; raises `UsageError` without the package gguf."""
        from autocompress.export.gguf_blocks import FLOAT_TYPES
        from autocompress.export.gguf_models import model_refusal
        from autocompress.export.gguf_tokenizer import tokenizer_refusal

        if base.auto_class != "AutoModelForCausalLM":
            return f"it holds causal language models, but got {base.auto_class}."
        require_packages(self)
        return (
            dtype_refusal(base, FLOAT_TYPES)
            or model_refusal(base.module)
            or tokenizer_refusal(base.processor)
        )

    def write(
        self,
        base: BaseModel,
        weights: Mapping[str, CompressedWeight],
        out: Path,
        *,
        claim: Mapping[str, Any],
    ) -> Manifest:
        """See `Exporter.write`; the manifest's notes give type and bits per weight by layer."""
        from autocompress.export.directory import new_directory
        from autocompress.export.writing import finish
        from autocompress.models.quiet import quiet_transformers

        weights = accepted(self, base, weights)
        allocation = Allocation.of({name: weight.scheme for name, weight in weights.items()})
        with new_directory(out) as directory:
            stored, notes = self._write_file(base, weights, directory / GGUF_FILE)
            with quiet_transformers():
                module = cast(Any, base.module)
                module.config.save_pretrained(directory)
                module.generation_config.save_pretrained(directory)
            return finish(
                directory,
                base,
                allocation=allocation,
                claim=claim,
                checkpoint_format=Gguf.name,
                notes=notes,
                foreign_bytes=stored,
            )

    def load(
        self,
        path: Path,
        *,
        dtype: str | torch.dtype | None,
        device: str,
        trust_remote_code: bool = False,  # noqa: ARG002
    ) -> nn.Module:
        """See `Exporter.load`: transformers, which decodes the file to dense weights.

        No code is trusted: clients of GGUF know the families that it holds by themselves.
        """
        from autocompress.export.gguf_loading import load_gguf

        return load_gguf(path, GGUF_FILE, dtype=dtype, device=device)

    def stored_bytes(self, path: Path) -> int:
        """See `Exporter.stored_bytes`."""
        require_packages(self)
        import gguf

        file = path / GGUF_FILE
        try:
            tensors = gguf.GGUFReader(file).tensors
        except (OSError, ValueError, LookupError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}. Next step: copy or export it again."
            ) from error
        return sum(int(tensor.n_bytes) for tensor in tensors)

    def _write_file(
        self, base: BaseModel, weights: Mapping[str, CompressedWeight], path: Path
    ) -> tuple[int, dict[str, tuple[str, ...]]]:
        """Bytes of the tensors written, and notes by layer."""
        import gguf

        from autocompress.export.gguf_models import ARCHITECTURES, add_metadata
        from autocompress.export.gguf_tensors import model_tensors
        from autocompress.export.gguf_tokenizer import add_tokenizer

        config: Any = base.module.config
        targets = {
            name: self.target(base.layout.layer(name), weight.scheme).ggml
            for name, weight in weights.items()
        }
        writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type].ggml)
        writer.add_name(f"{Path(base.source).name} compressed")
        add_metadata(writer, config)
        add_tokenizer(writer, base.processor, config.vocab_size)
        notes: dict[str, tuple[str, ...]] = {}
        sizes: Counter[str] = Counter()
        for tensor in model_tensors(base, weights, targets):
            kind = gguf.GGMLQuantizationType[tensor.ggml]
            writer.add_tensor(tensor.name, tensor.rows, raw_dtype=kind)
            sizes[tensor.ggml] += tensor.rows.nbytes
            if tensor.note:
                notes[tensor.layer] = (*weights[tensor.layer].notes, tensor.note)
        writer.add_file_type(_file_type(sizes))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return sizes.total(), notes


class GgufNearest(Gguf):
    """A GGUF file in which layers without a block type of their own are quantized again."""

    name = "gguf-nearest"
    summary = "as gguf, and what it refuses is quantized again: measure what you get"
    # Its quality is its own, not the claim's: the verification records it.
    tolerance = float("inf")

    def target(self, layer: LayerSpec, scheme: Scheme) -> Target:
        """See `Gguf.target`; the nearest type where there is no exact one."""
        from autocompress.export.gguf_blocks import nearest_target

        return nearest_target((layer.out_features, layer.in_features), layer.dtype, scheme)


def _file_type(sizes: Counter[str]) -> int:
    """GGUF's number for a file whose tensors are mostly of the type with most bytes."""
    import gguf

    largest = sizes.most_common(1)[0][0]
    named = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}.get(largest, f"MOSTLY_{largest}")
    return int(gguf.LlamaFileType[named])


EXPORTERS.add("gguf", Gguf())
EXPORTERS.add("gguf-nearest", GgufNearest())
