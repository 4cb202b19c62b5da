"""Device profiles in files: what is written is read, and what is no profile is refused."""

import json

import pytest

from autocompress.core.errors import UnknownNameError, UsageError
from autocompress.cost import DeviceProfile, find_profile, read_profile, write_profile

MINE = DeviceProfile("mine", 2e11, 3e10, 1 << 34, "measured here")


def test_a_written_profile_is_found_by_its_path(tmp_path):
    path = tmp_path / "deep" / "mine.json"
    write_profile(MINE, path)
    assert find_profile(str(path)) == MINE


def test_a_shipped_profile_is_found_by_its_name():
    assert find_profile("rtx-4090").name == "rtx-4090"
    with pytest.raises(UnknownNameError, match="rtx-4090"):
        find_profile("rtx-409")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "schema_version 1"),
        (json.dumps({"schema_version": 2}), "schema_version 1"),
        (json.dumps({"schema_version": 1, "name": "x"}), "fields"),
        (json.dumps({"schema_version": 1, **MINE.to_json(), "bytes_per_second": -1}), "positive"),
        (json.dumps({"schema_version": 1, **MINE.to_json(), "memory_bytes": "8"}), "fields"),
    ],
)
def test_what_is_no_profile_is_refused_with_the_next_step(tmp_path, content, message):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_profile(path)


def test_a_profile_needs_a_json_file(tmp_path):
    with pytest.raises(UsageError, match=r"--out .*mine\.txt\.json"):
        write_profile(MINE, tmp_path / "mine.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_profile(MINE, tmp_path / "file" / "mine.json")
