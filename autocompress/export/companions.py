"""Files beside the weights that other tools expect: of sentence-transformers, of processors."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path, PurePosixPath

from autocompress.core.errors import ModelError
from autocompress.models.pipeline import MODULES_FILE, PipelineModule, read_pipeline
from autocompress.models.sources import find_file

_SETTINGS = (MODULES_FILE, "sentence_bert_config.json", "config_sentence_transformers.json")
_PROCESSOR = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_WITHOUT_WEIGHTS = ("Pooling", "Normalize", "Dropout")
_OWN_FOLDER = PurePosixPath()  # of the model itself, which is written already

_log = logging.getLogger(__name__)

Files = dict[str, Path]
"""Where each file lies, by its name within the model."""


class _LostError(Exception):
    """Why a pipeline cannot go along."""


def copy_companions(source: str, directory: Path) -> None:
    """Copy what makes an embedding model load as a sentence-transformers model.

    Only JSON and safetensors are copied. A module's own weights are neither compressed nor counted.
    If a part cannot go along, nothing is copied, with a warning: half a pipeline would embed
    wrongly.

    Args:
        source: the base model's folder or hub id.
        directory: the checkpoint that is being written.
    """
    try:
        modules = read_pipeline(source)
        files = {n: path for m in modules for n, path in _files_of(source, m).items()}
    except (ModelError, _LostError) as error:
        _log.warning(
            "The export loses the model's sentence-transformers pipeline, and SentenceTransformer "
            "will pool by the mean: %s Next step: if you trust them, copy %s and the folders that "
            "it names from %s into the export.",
            error,
            MODULES_FILE,
            source,
        )
        return
    if modules:
        files |= _found(source, _SETTINGS)
    _copy(files, directory)


def copy_processor_files(source: str, directory: Path) -> None:
    """Copy what AutoProcessor reads of images, videos and chats, as far as it is not written.

    A search takes a tokenizer or an image processor; a model that reads both needs the rest too.

    Args:
        source: the base model's folder or hub id.
        directory: the checkpoint that is being written, with its tokenizer or image processor.
    """
    missing = tuple(name for name in _PROCESSOR if not (directory / name).exists())
    _copy(_found(source, missing), directory)


def _files_of(source: str, module: PipelineModule) -> Files:
    """What a module needs, without pickled weights of which there are safetensors too.

    Raises:
        _LostError: it is code of the repository, or needs a file of another kind.
    """
    if not module.is_known:
        raise _LostError(f"{module.kind} is code of the repository, which is not copied.")
    if module.folder == _OWN_FOLDER:
        return {}
    files = _listed(source, module)
    has_weights = any(name.endswith(".safetensors") for name in files)
    copied = {n: path for n, path in files.items() if n.endswith((".json", ".safetensors"))}
    for name in files.keys() - copied.keys():
        if not (name.endswith((".bin", ".pt")) and has_weights) and not name.endswith(".md"):
            raise _LostError(f"{name} is neither JSON nor safetensors.")
    return copied


def _listed(source: str, module: PipelineModule) -> Files:
    """The files of a module; those of a hub repository are known by name alone.

    Raises:
        _LostError: a hub module has no safetensors, and may need other files.
    """
    root = Path(source)
    if root.is_dir():
        paths = sorted(path for path in (root / module.folder).rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): path for path in paths}
    config, weights = ((module.folder / name).as_posix() for name in (_CONFIG, _WEIGHTS))
    if module.name in _WITHOUT_WEIGHTS:
        return _found(source, (config,))
    found = _found(source, (config, weights))
    if weights not in found:
        raise _LostError(f"{weights} is neither in the local cache nor to be had from the hub.")
    return found


def _found(source: str, names: tuple[str, ...]) -> Files:
    return {name: path for name in names if (path := find_file(source, name)) is not None}


def _copy(files: Files, directory: Path) -> None:
    for name, path in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
