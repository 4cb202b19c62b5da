"""Load a GGUF export by transformers, after holding it to its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

from autocompress.core.errors import CheckpointError
from autocompress.export.integrity import check_files
from autocompress.export.manifest import Manifest
from autocompress.models.quiet import quiet_transformers

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError)


def load_gguf(path: Path, file: str, *, dtype: str | torch.dtype | None, device: str) -> nn.Module:
    """The model of a GGUF export, decoded to dense weights, in evaluation mode.

    The config is that of config.json: the file's metadata say less about rotary frequencies and
    sliding windows than llama.cpp and transformers know.

    Args:
        path: directory of the export.
        file: name of the GGUF file in it.
        dtype: what to compute in; None for the base model's.
        device: torch device.

    Raises:
        CheckpointError: the export is damaged or incomplete.
    """
    check_files(path, Manifest.read(path))
    try:
        with quiet_transformers():
            config = _client_config(path)
            model, report = hf.AutoModelForCausalLM.from_pretrained(
                path,
                gguf_file=file,
                config=config,
                dtype=config.dtype if dtype is None else dtype,
                quantization_config=hf.GgufConfig(dequantize=True),
                output_loading_info=True,
                local_files_only=True,
            )
    except _LOADING_ERRORS as error:
        raise CheckpointError(
            f"{path / file} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    wrong = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if wrong:
        raise CheckpointError(
            f"{path / file} lacks {len(wrong)} tensors of the model that config.json describes, or "
            f"holds them in another shape, e.g. {wrong[0]}. Next step: export it again."
        )
    module: nn.Module = model.to(device).eval()
    return module


def _client_config(path: Path) -> Any:
    """config.json as transformers reads GGUF files by it: it knows mistral models as llama."""
    config = hf.AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type != "mistral":
        return config
    settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    return hf.LlamaConfig(**settings)
