"""Device profiles in files: what is written is read, and what is no profile is refused."""

import json
from dataclasses import replace

import pytest

from autocompress.core.errors import UnknownNameError, UsageError
from autocompress.cost import (
    DeviceProfile,
    LatencyTable,
    LayerTime,
    PassTimes,
    find_profile,
    read_profile,
    write_profile,
)

MINE = DeviceProfile("mine", 2e11, 3e10, 1 << 34, "measured here")
EMPTY = {"model": "m", "layers": "x", "dtype": "float32", "passes": []}


def test_a_written_profile_is_found_by_its_path(tmp_path):
    path = tmp_path / "deep" / "mine.json"
    write_profile(MINE, path)
    assert find_profile(str(path)) == MINE


def test_a_profile_with_measured_times_is_read_as_it_was_written(tmp_path):
    times = {"linear 8x4: base": LayerTime(2e-6, 1e-7), "linear 8x4: x": LayerTime(0.0, 1e-8)}
    table = LatencyTable(
        "m", "digest", "bfloat16", (PassTimes(1, 0.25, times), PassTimes(64, 1.5, times))
    )
    write_profile(replace(MINE, latency=table), tmp_path / "timed.json")
    assert read_profile(tmp_path / "timed.json") == replace(MINE, latency=table)


def test_a_profile_of_the_first_version_is_still_read(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"schema_version": 1, **MINE.to_json()}))
    assert read_profile(tmp_path / "old.json") == MINE


def test_a_shipped_profile_is_found_by_its_name():
    assert find_profile("rtx-4090").name == "rtx-4090"
    with pytest.raises(UnknownNameError, match="rtx-4090"):
        find_profile("rtx-409")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "schema_version 1 or 2"),
        (json.dumps({"schema_version": 3}), "schema_version 1 or 2"),
        (json.dumps({"schema_version": 2}), "fields"),
        (json.dumps({"schema_version": 2, **MINE.to_json(), "latency": {"model": 1}}), "fields"),
        (json.dumps({"schema_version": 2, **MINE.to_json(), "latency": EMPTY}), "rising numbers"),
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
