"""Packed checkpoints: bit-packed integers, masks and factors, as small as the search claimed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from autocompress.core import Allocation
from autocompress.core.errors import CheckpointError
from autocompress.export.directory import new_directory
from autocompress.export.manifest import Manifest
from autocompress.export.plan import PackedLayer, PackedPlan
from autocompress.export.quantizer import AutocompressConfig, AutocompressQuantizer
from autocompress.export.swapping import swap_modules
from autocompress.export.writing import finish, require_bytes, shallow_copy
from autocompress.methods import CompressedWeight, footprint, own_tensors, sharing_layers
from autocompress.models import BaseModel
from autocompress.models.experts import has_experts
from autocompress.models.quiet import quiet_transformers

MAX_SHARD_BYTES = 5_000_000_000


def write_packed(
    base: BaseModel,
    weights: Mapping[str, CompressedWeight],
    out: Path,
    *,
    claim: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Manifest:
    """Write a checkpoint that stores the named layers packed and all else as it is.

    Args:
        base: model that was compressed; it is not changed.
        weights: by layer name. Layers that are absent, or have the base scheme, stay as they are.
        out: new or empty directory; appears complete or not at all.
        claim: what was measured, for the manifest; if it holds ``storage_bytes`` the file must
            weigh that.
        max_shard_bytes: larger checkpoints are split into several files.

    Returns:
        The manifest that was written.

    Raises:
        RunDirectoryError: `out` is not empty or cannot be written.
        CheckpointError: the tensors do not weigh what was claimed.
        ModelError: a name is no layer, or the base model cannot be exported.
    """
    packed = {name: weight for name, weight in weights.items() if not weight.scheme.is_base}
    model = _packed_model(base, packed)
    with new_directory(out) as directory:
        with quiet_transformers():
            model.save_pretrained(
                directory, max_shard_size=max_shard_bytes, save_original_format=False
            )
        allocation = Allocation.of({name: weight.scheme for name, weight in packed.items()})
        notes = {name: weight.notes for name, weight in packed.items() if weight.notes}
        manifest = finish(
            directory,
            base,
            allocation=allocation,
            claim=claim,
            checkpoint_format="packed",
            notes=notes,
        )
        require_bytes(manifest.storage_bytes, _expected_bytes(base, packed), "their shapes give")
        if "storage_bytes" in claim:
            require_bytes(manifest.storage_bytes, claim["storage_bytes"], "the search claimed")
    return manifest


def _packed_model(base: BaseModel, weights: Mapping[str, CompressedWeight]) -> PreTrainedModel:
    """The base model with its layers packed; shares all other tensors with it."""
    model = shallow_copy(base.module)
    plan = PackedPlan(
        str(model.dtype).removeprefix("torch."),
        tuple(PackedLayer.of(base.layout.layer(n), w.scheme) for n, w in weights.items()),
        has_experts(model),
    )
    tensors = {
        name: {
            leaf: tensor.contiguous()
            for leaf, tensor in own_tensors(name, weight.scheme, weight.tensors).items()
        }
        for name, weight in weights.items()
    }
    _require_one_making(weights)
    swap_modules(model, plan, model.dtype, tensors)
    config = AutocompressConfig(plan)
    model.config.quantization_config = config
    model.hf_quantizer = AutocompressQuantizer(config)
    return model


def _require_one_making(weights: Mapping[str, CompressedWeight]) -> None:
    """Refuse layers that share a tensor and do not hold the same one: one would be lost.

    Raises:
        CheckpointError: names the layer.
    """
    for name, weight in weights.items():
        own = own_tensors(name, weight.scheme, weight.tensors)
        for leaf in weight.tensors.keys() - own.keys():
            lender = sharing_layers(name, weight.scheme)[0]
            if lender not in weights or not torch.equal(
                weights[lender].tensors[leaf], weight.tensors[leaf]
            ):
                raise CheckpointError(
                    f"{name} shares {leaf} with {lender}, but they were not compressed together. "
                    "Next step: remove the run's bank and export again."
                )


def _expected_bytes(base: BaseModel, weights: Mapping[str, CompressedWeight]) -> int:
    layout = base.layout
    packed = sum(
        footprint(layout.layer(name), weight.scheme).storage_bytes
        for name, weight in weights.items()
    )
    return layout.base_bytes + packed - sum(layout.layer(name).base_bytes for name in weights)
