"""Files beside the weights that other tools expect: those of sentence-transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath

_MODULES = "modules.json"
_FILES = (_MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")


def copy_companions(source: str, directory: Path) -> None:
    """Copy what makes an embedding model load as a sentence-transformers model.

    Only JSON is copied. If a module of the pipeline has weights of its own, which this package
    neither compresses nor counts, nothing is copied: half a pipeline would embed wrongly.

    Args:
        source: the base model's folder; a hub id has no folder and gives nothing.
        directory: the checkpoint that is being written.
    """
    root = Path(source)
    if not (root / _MODULES).is_file():
        return
    modules = json.loads((root / _MODULES).read_text(encoding="utf-8"))
    folders = [PurePosixPath(module["path"]) for module in modules if module.get("path")]
    if any(f.is_absolute() or ".." in f.parts for f in folders):
        return
    nested = [p for f in folders for p in (root / f).rglob("*") if p.is_file()]
    if any(path.suffix != ".json" for path in nested):
        return
    for path in [*(root / name for name in _FILES), *nested]:
        if path.is_file():
            target = directory / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
