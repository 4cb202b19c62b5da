"""What holds for every test."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

# A shell's background job ignores interrupts, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts a folder into a local cache of the hub, as if downloaded; gives the hub id.

    Files named in `absent` are ones that the hub is known not to have. The hub is not asked.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def cache(folder: Path, *, absent: tuple[str, ...] = ()) -> str:
        root, commit = tmp_path / "hub" / "models--someone--model", "0" * 40
        shutil.copytree(folder, root / "snapshots" / commit)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(commit)
        for name in absent:
            mark = root / ".no_exist" / commit / name
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        return "someone/model"

    return cache


_CONFIG = """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
_MODEL = """from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Makes a tiny Llama folder one of a model whose classes ship with it."""
    import transformers.dynamic_module_utils

    modules = tmp_path / "modules"
    monkeypatch.setenv("HF_MODULES_CACHE", str(modules))  # of processes that a test starts
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)

    def make(folder: Path) -> Path:
        (folder / "configuration_own.py").write_text(_CONFIG)
        (folder / "modeling_own.py").write_text(_MODEL)
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "own",
            "architectures": ["OwnForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_own.OwnConfig",
                "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
            },
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
