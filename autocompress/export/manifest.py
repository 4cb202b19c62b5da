"""autocompress.json: what a checkpoint claims, and checksums to hold it to. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autocompress.core.errors import CheckpointError, RunDirectoryError
from autocompress.export.plan import FORMAT_VERSION
from autocompress.export.schema import require_version, validate
from autocompress.export.tensor_file import stored_bytes

__all__ = ["MANIFEST_FILE", "FileRecord", "Manifest", "file_record", "is_export", "stored_bytes"]

MANIFEST_FILE = "autocompress.json"
_PIECE = 1 << 23  # in small ones a thread would wait for the interpreter after each


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Length and SHA-256 of one file (as `sha256sum` prints it)."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        checkpoint_format: name of the exporter that wrote it; of ``dense`` (decoded weights) the
            bytes are those of the base model.
        auto_class: transformers Auto class that loads it.
        base_model: path or id that it was made from.
        base_digest: of the base model's weights.
        storage_bytes: bytes of the tensors in its weight files.
        file_bytes: bytes of all its files but this one.
        claim: what the search measured for the member: bytes, quality, resources, and how.
        allocation: scheme of every compressed layer.
        notes: by layer, what methods had to say (fallbacks and their reasons).
        files: every file but this one.
        tensors: 128-bit digest of each stored tensor, to name the one that is damaged; empty where
            the weight files are not safetensors.
        libraries: versions that wrote it.
        verification: what a reload in a fresh process gave; None before that.
    """

    checkpoint_format: str
    auto_class: str
    base_model: str
    base_digest: str
    storage_bytes: int
    file_bytes: int
    claim: Mapping[str, Any]
    allocation: Mapping[str, str]
    notes: Mapping[str, tuple[str, ...]]
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, str]
    libraries: Mapping[str, str]
    verification: Mapping[str, Any] | None = None

    @property
    def simulated(self) -> bool:
        """True if the file does not store the compression: its bytes are the dense bytes."""
        return self.checkpoint_format == "dense"

    def with_verification(self, verification: Mapping[str, Any]) -> Manifest:
        """The manifest with the result of a reload."""
        return replace(self, verification=dict(verification))

    def to_json(self) -> dict[str, Any]:
        """The document of `autocompress.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "checkpoint_format": self.checkpoint_format,
            "simulated": self.simulated,
            "auto_class": self.auto_class,
            "base_model": self.base_model,
            "base_digest": self.base_digest,
            "storage_bytes": self.storage_bytes,
            "file_bytes": self.file_bytes,
            "claim": dict(self.claim),
            "allocation": dict(self.allocation),
            "notes": {name: list(notes) for name, notes in self.notes.items()},
            "files": {name: asdict(record) for name, record in self.files.items()},
            "tensors": dict(self.tensors),
            "libraries": dict(self.libraries),
            "verification": None if self.verification is None else dict(self.verification),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = MANIFEST_FILE) -> Manifest:
        """Read a document that anyone may have written.

        Raises:
            CheckpointError: it is malformed, or of a newer format version.
        """
        require_version(data, "format_version", FORMAT_VERSION, where)
        validate(data, "manifest", where)
        return cls(
            checkpoint_format=data["checkpoint_format"],
            auto_class=data["auto_class"],
            base_model=data["base_model"],
            base_digest=data["base_digest"],
            storage_bytes=data["storage_bytes"],
            file_bytes=data["file_bytes"],
            claim=data["claim"],
            allocation=data["allocation"],
            notes={name: tuple(notes) for name, notes in data["notes"].items()},
            files={name: FileRecord(**record) for name, record in data["files"].items()},
            tensors=data["tensors"],
            libraries=data["libraries"],
            verification=data["verification"],
        )

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = directory / MANIFEST_FILE
        if not path.is_file():
            raise CheckpointError(
                f"A checkpoint of autocompress holds {MANIFEST_FILE}, but {directory} does not. "
                "Next step: give the --out directory of `autocompress export`; load any other "
                "model with transformers."
            )
        try:
            data = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {error}). Next step: export again."
            ) from error
        return cls.from_json(data, str(path))

    def write(self, directory: Path) -> None:
        """Write the manifest of a checkpoint by atomic rename.

        Raises:
            RunDirectoryError: the directory cannot be written.
            CheckpointError: a value does not fit the format (a claim that is not finite).
        """
        path = directory / MANIFEST_FILE
        document = self.to_json()
        validate(document, "manifest", str(path))
        temporary = path.with_suffix(".json.tmp")
        try:
            text = json.dumps(document, indent=1, allow_nan=False)
            temporary.write_text(text + "\n", "utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunDirectoryError(f"{path} cannot be written: {error.strerror}.") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: a number of the claim is not finite.") from error


def is_export(directory: Path) -> bool:
    """True if the directory is a checkpoint that this package wrote."""
    return (directory / MANIFEST_FILE).is_file()


def file_record(path: Path) -> FileRecord:
    """Length and checksum of a file."""
    size = path.stat().st_size
    found, piece = hashlib.sha256(), memoryview(bytearray(min(size, _PIECE)))
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(piece):
            found.update(piece[:n_bytes])
    return FileRecord(size, found.hexdigest())


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
