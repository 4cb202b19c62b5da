"""What sentence-transformers does with a model's hidden states: its ``modules.json``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from autocompress.core.errors import ModelError
from autocompress.models.sources import find_file, is_unknown

MODULES_FILE = "modules.json"
_OWN = "sentence_transformers."
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # in the order in which their embeddings are joined

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PipelineModule:
    """One step of a pipeline.

    Attributes:
        kind: dotted name of its class.
        folder: of its files, within the model; ``.`` for the model's own.
    """

    kind: str
    folder: PurePosixPath

    @property
    def name(self) -> str:
        """Its class, for one that sentence-transformers ships, else the dotted name."""
        return self.kind.rpartition(".")[2] if self.is_known else self.kind

    @property
    def is_known(self) -> bool:
        """True if sentence-transformers ships the class; any other is code of the repository."""
        return self.kind.startswith(_OWN)


def has_pipeline(source: str) -> bool:
    """True if a model folder or hub repository has a pipeline, as far as can be told offline."""
    return find_file(source, MODULES_FILE) is not None


def read_pipeline(source: str) -> tuple[PipelineModule, ...]:
    """The steps of a model's pipeline in their order; empty if it has none.

    Raises:
        ModelError: ``modules.json`` is damaged, or leads out of the model.
    """
    found = _read(source, MODULES_FILE)
    if found is None:
        return ()
    try:
        modules = tuple(PipelineModule(str(m["type"]), PurePosixPath(m["path"])) for m in found)
    except (TypeError, KeyError) as error:
        raise _damaged(source, MODULES_FILE, f"{type(error).__name__}: {error}") from error
    for module in modules:
        if module.folder.is_absolute() or ".." in module.folder.parts:
            raise _damaged(source, MODULES_FILE, f"{str(module.folder)!r} leads out of the model")
    return modules


def read_pooling(source: str) -> str:
    """How a model's pipeline pools hidden states, e.g. ``mean``, ``cls`` or ``cls+max``.

    ``mean`` without a pipeline, or without pooling in it. A pooling module of another kind gives
    its class.

    Args:
        source: folder or hub id.

    Raises:
        ModelError: the pipeline is damaged, or a file of it is not there.
    """
    if is_unknown(source, MODULES_FILE):
        _log.warning(
            "%s is not in the local cache and the hub cannot be asked: mean pooling is assumed. "
            "Download the whole model if its pipeline says otherwise.",
            f"{source}/{MODULES_FILE}",
        )
    poolings = [m for m in read_pipeline(source) if m.kind.endswith("Pooling")]
    if not poolings:
        return "mean"
    module = poolings[0]
    if module.name != "Pooling":
        return module.name
    file = (module.folder / "config.json").as_posix()
    config = _read(source, file)
    if not isinstance(config, Mapping):
        raise _damaged(source, file, "it is missing" if config is None else "it is no object")
    return "+".join(_modes(config)) or "mean"


def _modes(config: Mapping[str, Any]) -> list[str]:
    stated = config.get("pooling_mode")
    if stated is None:
        return [mode for flag, mode in _LEGACY_MODES.items() if config.get(flag)]
    return list(map(str, stated)) if isinstance(stated, list) else [str(stated)]


def _read(source: str, name: str) -> Any:
    """The content of a JSON file of the model; None if there is none."""
    path = find_file(source, name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(source, name, f"{type(error).__name__}: {error}") from error


def _damaged(source: str, name: str, problem: str) -> ModelError:
    return ModelError(
        f"The sentence-transformers pipeline of {source} cannot be read: {name}: {problem}. Next "
        "step: download or save the whole model again."
    )
