"""Turns a GGUF file into a base model, once, so that every later load is an ordinary one."""

from __future__ import annotations

import importlib.util
import shutil
import struct
from pathlib import Path

import torch
import transformers as hf
from safetensors import SafetensorError

from autocompress.core.errors import ModelError, RunDirectoryError
from autocompress.models.quiet import quiet_transformers
from autocompress.models.sources import nearest_folders

_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "accelerate")


def dequantize_gguf(gguf_path: str | Path, out_dir: str | Path, *, dtype: str = "bfloat16") -> Path:
    """Write the dequantized model and its tokenizer as a safetensors checkpoint.

    The values are those that the GGUF file stands for, rounded to `dtype`; searching such a model
    measures what is lost on top of the file's own quantization. The folder appears by a rename, so
    it is there whole or not at all.

    Args:
        gguf_path: a causal language model of an architecture that transformers reads from GGUF.
        out_dir: folder to create; must not exist, or be empty.
        dtype: of the written weights.

    Returns:
        `out_dir`, absolute.

    Raises:
        ModelError: the file is missing, damaged or of an architecture that cannot be read; a
            package for reading GGUF is not installed.
        RunDirectoryError: `out_dir` is not empty or cannot be written.
    """
    source, target = Path(gguf_path).expanduser().resolve(), Path(out_dir).expanduser().resolve()
    _require_readable(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunDirectoryError(f"{target} must be new or empty. Remove it or name another folder.")
    partial = target.with_name(f"{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _convert(source, partial, dtype)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(f"The model cannot be written to {target}: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _require_readable(source: Path) -> None:
    if not source.is_file():
        raise ModelError(f"The GGUF file {source} does not exist. {nearest_folders(str(source))}")
    with source.open("rb") as stream:
        start = stream.read(len(_MAGIC))
    if start != _MAGIC:
        raise ModelError(
            f"A GGUF file starts with {_MAGIC!r}, but {source} starts with {start!r}. "
            "Download it again."
        )
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise ModelError(f"Reading GGUF needs more packages: pip install {' '.join(absent)}.")


def _convert(source: Path, folder: Path, dtype: str) -> None:
    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with quiet_transformers():
        try:
            model, info = hf.AutoModelForCausalLM.from_pretrained(
                **location,
                dtype=getattr(torch, dtype),
                quantization_config=hf.GgufConfig(dequantize=True),
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
            tokenizer = hf.AutoTokenizer.from_pretrained(**location)
        except (OSError, ValueError, KeyError, RuntimeError, IndexError, struct.error) as error:
            raise ModelError(
                f"{source} cannot be read as a causal language model: {error}. It may be "
                "truncated, or of an architecture that transformers does not read from GGUF."
            ) from error
        wrong = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
        if wrong:
            raise ModelError(
                f"{source} lacks {len(wrong)} tensors of {type(model).__name__}, or holds them in "
                f"another shape, e.g. {wrong[0]!r}. Transformers does not read this file rightly."
            )
        model.save_pretrained(folder, max_shard_size="1000GB")
        tokenizer.save_pretrained(folder)
