"""Checkpoints in the format of `compressed-tensors`: stock transformers and vLLM load them.

Codes and scales are those of the search; nothing is quantized again. A weight of b bits is stored
as a stream of b-bit codes, lowest bit first, each row filled up to 32-bit words; weights whose
inputs are rounded to 8 bits too are stored as int8. The layout is that of compressed-tensors 0.20
(https://github.com/vllm-project/compressed-tensors), whose own packing the tests compare with;
writing does not need the package. Imports no torch before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.core import Allocation, LayerSpec, Scheme
from autocompress.export.exporter import EXPORTERS, Exporter, accepted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autocompress.export.manifest import Manifest
    from autocompress.methods import CompressedWeight
    from autocompress.models import BaseModel

QUANT_METHOD = "compressed-tensors"
PACKED, INT8 = "pack-quantized", "int-quantized"
_WORD = 32  # bits


@dataclass(frozen=True, slots=True)
class GroupScheme:
    """What layers of one entry of `config_groups` have in common.

    Attributes:
        bits: of a code.
        group_size: weights of a row that share a scale; None: the whole row.
        int8_inputs: inputs are rounded to 8 bits, one scale per token, while the layer runs.
    """

    bits: int
    group_size: int | None
    int8_inputs: bool

    @property
    def format(self) -> str:
        """Name of the tensor layout."""
        return INT8 if self.int8_inputs else PACKED

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """The entry of `config_groups` for layers of these names."""
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
        }  # fmt: skip
        inputs = {
            "num_bits": 8, "type": "int", "symmetric": True, "dynamic": True,
            "strategy": "token", "group_size": None,
        }  # fmt: skip
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs if self.int8_inputs else None,
            "output_activations": None,
            "format": self.format,
        }


def group_scheme(layer: LayerSpec, scheme: Scheme) -> GroupScheme | str:
    """How the format holds `layer` under `scheme`, or why it cannot."""
    from autocompress.methods.grid import GridCoding
    from autocompress.methods.schemes import plan

    if layer.kind != "linear":
        return f"it holds linear layers only, but this is of the kind {layer.kind}."
    if layer.aliases:
        return (
            "it holds layers with a weight of their own, but this one is tied to "
            f"{', '.join(layer.aliases)}."
        )
    ready = plan(scheme)
    coding = ready.coding
    alone = len(ready.steps) == 1 + (ready.inputs is not None)
    if not alone or type(coding) is not GridCoding:
        return f"it holds integer codes of rtn or gptq and nothing beside them, but got {scheme}."
    options = coding.options
    if not options.symmetric:
        return f"its loaders read no packed zero points, so symmetric must be true, got {scheme}."
    width = options.width(layer.in_features)
    if layer.in_features % width:
        legal = [n for n in range(1, layer.in_features + 1) if layer.in_features % n == 0]
        near = min(legal, key=lambda n: (abs(n - width), -n))
        return (
            f"group_size must divide the {layer.in_features} inputs or be 0 (the whole row), but "
            f"got {options.group_size}. The nearest legal value is {near}."
        )
    group = None if width == layer.in_features else width
    if ready.inputs is None:
        return GroupScheme(options.bits, group, int8_inputs=False)
    inputs = ready.inputs.method.canonical(scheme.stages[-1])
    if (options.bits, group, str(inputs)) != (8, None, "int_inputs(bits=8)"):
        return (
            "inputs are rounded by int_inputs(bits=8) beside weights of bits=8, group_size=0, but "
            f"got {scheme}."
        )
    return GroupScheme(8, None, int8_inputs=True)


class CompressedTensors(Exporter):
    """Integer codes that transformers with the `compressed-tensors` package, and vLLM, load."""

    name = "compressed-tensors"
    summary = "integer linear layers; stock transformers and vLLM load it"
    modules = ("compressed_tensors",)
    extra = "compressed-tensors"
    # Its client takes 127.5, not 127, codes per largest input, and in a bfloat16 model rounds the
    # float16 scales.
    tolerance = 5e-3

    def refusal(self, layer: LayerSpec, scheme: Scheme) -> str:
        """See `Exporter.refusal`."""
        if scheme.is_base:
            return ""
        found = group_scheme(layer, scheme)
        return found if isinstance(found, str) else ""

    def refusal_of_model(self, base: BaseModel) -> str:
        """Stock transformers must be able to load its layers without a `weight`.

        And it must find each tensor under its own name: of a compressed-tensors checkpoint it does
        not stack experts that are stored one by one, the form in which it saves them.
        """
        if any(layer.expert is not None for layer in base.layout.layers):
            return "stock transformers must load it, which joins no experts there."
        part = _part_that_wants_weights(base.module)
        if not part:
            return ""
        return (
            "stock transformers must load it with packed linear layers, which have no weights to "
            f"initialize, but the initialization of its {part} wants them."
        )

    def write(
        self,
        base: BaseModel,
        weights: Mapping[str, CompressedWeight],
        out: Path,
        *,
        claim: Mapping[str, Any],
    ) -> Manifest:
        """See `Exporter.write`."""
        from autocompress.export.directory import new_directory
        from autocompress.export.writing import finish, require_bytes, shallow_copy
        from autocompress.models.quiet import quiet_transformers

        weights = accepted(self, base, weights)
        schemes = {name: weight.scheme for name, weight in weights.items()}
        model = shallow_copy(base.module)
        groups = _groups(base, schemes)
        tensors = {name: _stored(weights[name], group) for name, group in groups.items()}
        with new_directory(out) as directory:
            with quiet_transformers():
                model.save_pretrained(directory, state_dict=_state(model, tensors))
            if groups:
                _write_config(directory / "config.json", _config(model, groups))
            manifest = finish(
                directory,
                base,
                allocation=Allocation.of(schemes),
                claim=claim,
                checkpoint_format=self.name,
                notes={name: w.notes for name, w in weights.items() if w.notes},
            )
            saved = sum(base.layout.layer(name).base_bytes for name in groups)
            stored = sum(t.nbytes for layer in tensors.values() for t in layer.values())
            expected = base.layout.base_bytes - saved + stored
            require_bytes(manifest.storage_bytes, expected, "their shapes give")
        return manifest


def _part_that_wants_weights(module: nn.Module) -> str:
    """Class of a part whose initialization fails if linear layers have no weight; empty if none.

    Tried on a copy without data: initialization writes.
    """
    import copy

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return ""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in module.parameters()
    }
    buffers = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    model = copy.deepcopy(module, {**empty, **buffers})
    parts = [part for part in model.modules() if not isinstance(part, nn.Linear)]
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            del layer.weight
    for part in parts:
        try:
            model._init_weights(part)
        except AttributeError as error:
            if "'weight'" in str(error):
                return type(part).__name__
        except RuntimeError:  # an operation that needs data
            continue
    return ""


def _groups(base: BaseModel, schemes: Mapping[str, Scheme]) -> dict[str, GroupScheme]:
    groups = {}
    for name, scheme in schemes.items():
        found = group_scheme(base.layout.layer(name), scheme)
        assert not isinstance(found, str)  # the caller has checked
        groups[name] = found
    return groups


def _stored(weight: CompressedWeight, group: GroupScheme) -> dict[str, Tensor]:
    """Tensors of one layer, by name within it."""
    import torch

    from autocompress.methods.packing import unpack

    o, d = weight.shape
    codes = unpack(weight.tensors["packed"], group.bits, o * d).view(o, d)
    scales = weight.tensors["scales"].contiguous()
    if group.int8_inputs:
        return {"weight": codes.view(torch.int8) ^ -128, "weight_scale": scales}
    return {
        "weight_packed": pack_words(codes, group.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes (o, d) uint8 of `bits` bits as (o, ceil(d * bits / 32)) int32, lowest bit first."""
    import torch
    from torch.nn.functional import pad

    from autocompress.methods.packing import pack

    o, d = codes.shape
    padded = pad(codes, (0, -d % _WORD))
    words = pack(padded, bits).view(torch.int32).view(o, -1)
    return words[:, : -(-d * bits // _WORD)].contiguous()


def _state(model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state of `model` with the weights of the named layers replaced by what they store."""
    replaced = {f"{name}.weight" for name in tensors}
    state = {name: t for name, t in model.state_dict().items() if name not in replaced}
    for name, stored in tensors.items():
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
    return state


def _config(model: nn.Module, groups: Mapping[str, GroupScheme]) -> dict[str, Any]:
    """The `quantization_config`: layers by exact name, all other linear layers ignored."""
    from torch import nn

    distinct = sorted(set(groups.values()), key=lambda g: (g.bits, g.group_size or 0, g.format))
    formats = {group.format for group in distinct}
    return {
        "quant_method": QUANT_METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{i}": group.to_json([n for n, g in groups.items() if g == group])
            for i, group in enumerate(distinct)
        },
        "ignore": [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name not in groups
        ],
    }


def _write_config(path: Path, quantization: Mapping[str, Any]) -> None:
    config = json.loads(path.read_text("utf-8"))
    config["quantization_config"] = dict(quantization)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


EXPORTERS.add(CompressedTensors.name, CompressedTensors())
