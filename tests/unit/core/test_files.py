import pytest

from autocompress.core.files import write_atomically


@pytest.mark.parametrize(("content", "stored"), [("häuser\n", "häuser\n".encode()), (b"\0", b"\0")])
def test_a_file_holds_what_was_written_last(tmp_path, content, stored):
    path = tmp_path / "file"
    write_atomically(path, "before")
    write_atomically(path, content)
    assert path.read_bytes() == stored
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "before")

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", "text")
