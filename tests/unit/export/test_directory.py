import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autocompress.core.errors import CheckpointError, RunDirectoryError
from autocompress.export import write_packed
from autocompress.export.directory import new_directory
from autocompress.models import BaseModel

from .conftest import compress_all


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_directory(out) as directory:
        (directory / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_those_who_may_read_the_directory_may_read_its_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out) as directory:
        (directory / "file").touch(mode=0o600)
    assert (out / "file").stat().st_mode & 0o777 == out.stat().st_mode & 0o666


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with new_directory(out) as directory:
        (directory / "file").write_text("x")
    assert (out / "file").read_text() == "x"


def fail_within(out: Path, error: BaseException) -> None:
    with new_directory(out) as directory:
        (directory / "file").write_text("x")
        raise error


@pytest.mark.parametrize("error", [KeyError("x"), CheckpointError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_and_is_passed_on(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail_within(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(RunDirectoryError, match="cannot be written: No space left on device"),
        new_directory(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_files_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out, what in ((tmp_path, "files"), (tmp_path / "file", "a file")):
        with pytest.raises(RunDirectoryError, match=f"already holds {what}"), new_directory(out):
            raise AssertionError
    assert (tmp_path / "file").read_text() == "x"


def test_a_path_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(RunDirectoryError, match="cannot be written"),
        new_directory(tmp_path / "file" / "out"),
    ):
        raise AssertionError


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_place_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with (
            pytest.raises(RunDirectoryError, match="Permission denied"),
            new_directory(tmp_path / "out"),
        ):
            raise AssertionError
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.slow
def test_an_export_that_outgrows_the_disk_leaves_nothing(base: BaseModel, tmp_path: Path) -> None:
    """The kernel refuses to let the weight file grow: what a full disk or quota does."""
    compress_all(base)  # the child does the same; fail here first if that is broken
    program = f"""
import resource, signal, sys, torch, transformers
from pathlib import Path
from autocompress.core import Scheme
from autocompress.core.errors import RunDirectoryError
from autocompress.export import write_packed
from autocompress.methods import LayerStatistics, compress
from autocompress.models import BaseModel, describe, weight_matrix
module = transformers.AutoModelForCausalLM.from_pretrained({base.source!r})
layout = describe(module)
base = BaseModel(module, layout, None, 'x', 'AutoModelForCausalLM', '0')
layer = layout.layers[1]
scheme = Scheme.parse('rtn(bits=4)')
weights = {{layer.name: compress(weight_matrix(module, layer), scheme, LayerStatistics.none())}}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    write_packed(base, weights, Path(sys.argv[1]) / 'out', claim={{}})
except RunDirectoryError as error:
    sys.exit(0 if 'cannot be written' in str(error) else 1)
sys.exit(2)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_weight_file_that_cannot_be_written_is_one_clear_error(
    base: BaseModel, weights: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", refuse)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        write_packed(base, weights, tmp_path / "out", claim={})
    assert list(tmp_path.iterdir()) == []
