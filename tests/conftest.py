"""What holds for every test."""

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
