"""The client of OpenVINO exports: a module that runs the compiled model on the CPU, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openvino
import torch
import transformers
from torch import Tensor, nn

from autocompress.core.errors import CheckpointError, UsageError
from autocompress.export.integrity import check_files
from autocompress.export.manifest import Manifest
from autocompress.export.openvino import MODEL_FILE
from autocompress.export.openvino_forms import OUTPUTS
from autocompress.export.openvino_graph import BEAM

EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
"""As in the search: neither activations nor the cache of keys and values are rounded."""


class OpenVinoModule(nn.Module):
    """A compiled model, called like the torch model that it was made from.

    Attributes:
        config: of the model.
        stateful: it keeps keys and values; every call here starts with none.
    """

    def __init__(self, compiled: Any, config: Any) -> None:
        super().__init__()
        self.config = config
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.names}
        self._outputs = [name for name in OUTPUTS if any(name in p.names for p in compiled.outputs)]
        self.stateful = BEAM in self._inputs
        self._n_past = 0
        # Callers read off a parameter where, and in which dtype, they put the inputs.
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """Outputs by name (``logits``, ``last_hidden_state``), float32, of whole sequences.

        What the model does not read is ignored; a mask, positions and types that are not given
        are those of single texts without padding.
        """
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask,
            "token_type_ids": token_type_ids, "position_ids": position_ids,
            "pixel_values": pixel_values,
        }  # fmt: skip
        feeds = {name: t for name, t in given.items() if t is not None}
        if input_ids is not None:
            feeds = _defaults(input_ids, 0) | feeds
            self._n_past = input_ids.shape[1]
        if self.stateful:
            self._request.reset_state()
        return self._infer(feeds)

    def extend(self, input_ids: Tensor) -> SimpleNamespace:
        """Outputs for tokens (batch, new) that follow those of the last call, none of them padding.

        Raises:
            UsageError: the model keeps no state.
        """
        if not self.stateful:
            raise UsageError(
                "Only causal language models go on from the last call, but this model keeps no "
                "keys and values. Next step: call it with whole sequences."
            )
        feeds = _defaults(input_ids, self._n_past)
        self._n_past += input_ids.shape[1]
        return self._infer(feeds)

    def _infer(self, feeds: Mapping[str, Tensor]) -> SimpleNamespace:
        found = self._request.infer(
            {name: tensor.numpy() for name, tensor in feeds.items() if name in self._inputs},
            share_outputs=True,
        )
        return SimpleNamespace(
            **{name: torch.from_numpy(found[name].copy()) for name in self._outputs}
        )


def _defaults(input_ids: Tensor, n_past: int) -> dict[str, Tensor]:
    n, new = input_ids.shape
    positions = torch.arange(n_past, n_past + new)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones(n, n_past + new, dtype=torch.int64),
        "token_type_ids": torch.zeros_like(input_ids),
        "position_ids": positions.expand(n, new).contiguous(),
        BEAM: torch.arange(n, dtype=torch.int32),
    }


def load_openvino(path: Path, *, trust_remote_code: bool = False) -> OpenVinoModule:
    """The model of an OpenVINO export, compiled for the CPU in float32.

    Args:
        path: directory of the export.
        trust_remote_code: run the code of a config that is no part of transformers.

    Raises:
        CheckpointError: the export is damaged or incomplete.
    """
    check_files(path, Manifest.read(path))
    return compiled(path, trust_remote_code=trust_remote_code)


def compiled(
    path: Path,
    options: Mapping[str, Any] = EXACT,
    *,
    config: Any = None,
    trust_remote_code: bool = False,
) -> OpenVinoModule:
    """The same, without a look at the manifest, under `options` of the CPU plugin.

    It takes as many threads as torch has been given, and `config` instead of the file's, if given.
    """
    threads = str(torch.get_num_threads())
    settings = {"INFERENCE_NUM_THREADS": threads, **options}
    try:
        model = openvino.Core().compile_model(path / MODEL_FILE, "CPU", settings)
        if config is None:
            config = transformers.AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path / MODEL_FILE} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return OpenVinoModule(model, config).eval()
