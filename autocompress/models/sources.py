"""Where a model comes from: a local folder, checked before anything is loaded, or a hub id."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from urllib.request import getproxies

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

from autocompress.core.errors import ModelError, nearest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_HUB_HOST = "huggingface.co"
_INDEX = "model.safetensors.index.json"


def resolve_source(source: str) -> str:
    """The absolute path of a local model folder, or a hub id unchanged.

    Raises:
        ModelError: the path does not exist, or is a file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file() and path.suffix == ".gguf":
        raise ModelError(
            f"A search starts from an uncompressed model, but {source!r} is a GGUF file. "
            f'Dequantize it once: python -c "from autocompress.models.gguf import dequantize_gguf; '
            f"dequantize_gguf('{source}', 'dequantized')\"."
        )
    if path.is_file():
        raise ModelError(
            f"A model is a folder with config.json and safetensors files, but {source!r} is a "
            f"file. Give its folder: {str(path.parent)!r}."
        )
    if _HUB_ID.fullmatch(source):
        return source
    raise ModelError(f"The model folder {source!r} does not exist. {nearest_folders(source)}")


def nearest_folders(source: str) -> str:
    """What exists near a path that does not: a clause for an error message."""
    path = Path(source).expanduser().absolute()
    while not path.parent.is_dir():
        path = path.parent
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir() and p.name[0] not in "._"]
    return f"In {path.parent}: {nearest(path.name, siblings)}"


def hub_is_offline() -> bool:
    """True if the hub cannot be asked, so that only its local cache is worth a look.

    Spares people without a network half a minute of retries. A proxy may resolve names for us.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return True
    if getproxies() or "HF_ENDPOINT" in os.environ:
        return False
    try:
        socket.getaddrinfo(_HUB_HOST, 443)
    except OSError:
        return True
    return False


def find_file(source: str, name: str) -> Path | None:
    """A file of a model: of its folder, of the hub's local cache, else downloaded.

    Args:
        source: folder, or hub id.
        name: with ``/`` between folders.

    Returns:
        Where it lies; None if the model has no such file, or the hub cannot be asked for it.
    """
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    cached = _cached(source, name)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None
    if hub_is_offline():
        return None
    try:
        return Path(hf_hub_download(source, name))
    except (EntryNotFoundError, OSError, ValueError):  # it is not there, or not for us
        return None


def is_unknown(source: str, name: str) -> bool:
    """True if a hub model may have this file, but neither the cache nor the hub can say so."""
    if Path(source).is_dir() or find_file(source, name) is not None:
        return False
    return _cached(source, name) is None


def _cached(source: str, name: str) -> object:
    """Path of a cached file, the mark of one that the repository does not have, or None."""
    try:
        return try_to_load_from_cache(source, name)
    except ValueError:  # no hub id, but a folder that is gone
        return None


def check_folder(folder: Path) -> None:
    """Check that a local folder holds a complete safetensors checkpoint. Reads headers only.

    Raises:
        ModelError: a file is missing, empty or truncated; names it.
    """
    _require_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    files.extend(folder / name for name in _indexed_files(folder) if folder / name not in files)
    if not files:
        raise ModelError(f"{folder} holds no weights. {_what_to_do_without_weights(folder)}")
    for file in files:
        _check_safetensors(file)


def _require_config(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
    if gguf is not None:
        resolve_source(str(gguf))
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ModelError(
        f"A model folder must hold config.json, but {folder} holds {found}. "
        "Save the model there with save_pretrained, or give another folder."
    )


def _indexed_files(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.is_file():
        return []
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{index} must map weight names to files, but cannot be read: {error!r}. "
            "Download or save the model again."
        ) from error


def _what_to_do_without_weights(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return (
            "It has pickle files, which can run code when opened and are not read. Convert it "
            "once: AutoModel.from_pretrained(folder).save_pretrained(folder) writes safetensors."
        )
    return "Save the model there with save_pretrained, which writes model.safetensors."


def _check_safetensors(file: Path) -> None:
    """Compare the size of a safetensors file with what its header says."""
    size = file.stat().st_size if file.is_file() else None
    problem = "is missing" if size is None else _damage(file, size)
    if problem is not None:
        raise ModelError(
            f"The checkpoint is damaged: {file} {problem}. Download or save the model again."
        )


def _damage(file: Path, size: int) -> str | None:
    if size == 0:
        return "is empty (0 bytes)"
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + header_bytes > size:
            return f"is truncated within its header ({size} bytes)"
        try:
            header = json.loads(stream.read(header_bytes))
            ends = [t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "has a header that cannot be read"
    expected = 8 + header_bytes + max(ends, default=0)
    return None if size == expected else f"has {size} bytes where its header says {expected}"
