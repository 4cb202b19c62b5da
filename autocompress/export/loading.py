"""Load an exported checkpoint, after holding it to its manifest."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from autocompress.core.errors import AutocompressError, CheckpointError, UsageError, nearest
from autocompress.export.hook import install
from autocompress.export.integrity import checking
from autocompress.export.manifest import Manifest
from autocompress.export.modules import use_kernels
from autocompress.kernels import require_choice
from autocompress.models.quiet import quiet_transformers

# What transformers raises, in one place or another, on a config.json that makes no sense.
_LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError,
    AssertionError, ImportError, StrictDataclassError,
)  # fmt: skip


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    auto_class: str | None = None,
    kernels: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint that `autocompress export` wrote.

    Every file is held to its checksum, the weights while they load. Weights are safetensors, and
    nothing in the checkpoint is executed unless the caller allows it, whatever its files say.

    Args:
        path: directory of the checkpoint.
        dtype: what to compute in, e.g. ``"bfloat16"``; None for the checkpoint's own.
        device: torch device to put the model on.
        auto_class: another transformers Auto class than the one it was exported with, e.g.
            ``"AutoModel"`` to drop the head.
        kernels: ``"reference"`` decodes every layer whenever it runs and computes what the search
            measured, bit for bit; ``"auto"`` runs each layer on the fastest kernel within its
            rounding; ``"dense"`` decodes once and keeps the result. None for the environment
            variable ``AUTOCOMPRESS_KERNELS``, else ``"reference"``.
        trust_remote_code: run the Python files that a model with code of its own is made of. They
            are in the checkpoint; read them first.

    Returns:
        The model in evaluation mode. Packed layers stay packed in memory.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a newer format version, or needs
            code of its own that may not run.
        UsageError: no such `auto_class` or `kernels`.
    """
    if kernels is not None:
        require_choice(kernels)
    directory = Path(path)
    manifest = Manifest.read(directory)
    loader = _auto_class(auto_class or manifest.auto_class, auto_class is not None)
    install()
    try:
        with checking(directory, manifest), quiet_transformers():
            model, report = loader.from_pretrained(
                directory,
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
            )
    except AutocompressError:
        raise
    except _LOADING_ERRORS as error:
        raise CheckpointError(_refusal(directory, error)) from error
    if auto_class is None:
        _require_complete(directory, report)
    if kernels is not None:
        use_kernels(model, kernels)
    return cast(PreTrainedModel, model.to(device).eval())


def _refusal(directory: Path, error: Exception) -> str:
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return (
            f"Code of a checkpoint runs only if you ask for it, but {directory} is made of code of "
            "its own. Next step: read its .py files, then load it with trust_remote_code=True "
            "(--trust-remote-code)."
        )
    return f"{directory} cannot be loaded: {type(error).__name__}: {error}"


def _auto_class(name: str, asked_for: bool) -> Any:
    known = import_module("transformers.models.auto.modeling_auto").__all__
    if name in known and name.startswith("AutoModel"):
        return getattr(transformers, name)
    message = f"Unknown Auto class {name!r}. {nearest(name, known)}"
    if asked_for:
        raise UsageError(message)
    raise CheckpointError(f"The manifest names a class that is not there. {message}")


def _require_complete(directory: Path, report: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, report[kind]))
        if names:
            raise CheckpointError(
                f"{directory} does not fit the model that its config.json describes: "
                f"{kind.replace('_', ' ')} {', '.join(names[:3])}. Next step: export it again."
            )
