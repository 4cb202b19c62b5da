import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from autocompress.core import (
    Allocation,
    Measurement,
    Metrics,
    Quality,
    Resource,
    Scheme,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.core.errors import RunDirectoryError
from autocompress.search.journal import Journal, read_journal


def result(number, damage=0.1):
    allocation = Allocation.of({"layer": Scheme.parse(f"rtn(bits={number % 7 + 2})")})
    quality = Quality(1 - damage, 0.01, Measurement(damage, 0.01), {}, 100)
    metrics = Metrics(quality, {"storage_bytes": Resource(10.0 + number, "bytes", "analytic")})
    request = TrialRequest(number, allocation, "sampler:random")
    return TrialResult(request, TrialStatus.COMPLETE, metrics, 0.25, 100, sampler_state={"g": 1})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "trials.jsonl"


def written(path, n):
    results = [result(i, damage=0.1 / (i + 3)) for i in range(n)]
    with Journal(path) as journal:
        for each in results:
            journal.append(each)
    return results


def test_what_was_appended_is_read_back_equal(path):
    results = written(path, 3)
    assert list(read_journal(path).results) == results
    with Journal(path) as journal:
        assert journal.read() == results
        journal.append(result(7))
    assert [r.request.number for r in read_journal(path).results] == [0, 1, 2, 7]


def test_each_trial_is_one_line_of_json(path):
    written(path, 2)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [0, 1]
    assert json.loads(lines[0])["status"] == "complete"


def test_each_line_is_on_the_disk_when_append_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    with Journal(path) as journal:
        journal.append(result(0))
        assert synced == [path.stat().st_size]


def test_a_torn_last_line_is_set_aside_with_its_bytes_and_a_warning(path, caplog):
    results = written(path, 3)
    whole = path.read_bytes()
    torn = b'{"number": 3, "id": "ab'
    path.write_bytes(whole + torn)
    with Journal(path) as journal:
        assert journal.read() == results
        journal.append(result(3))
    assert (path.parent / "trials.jsonl.torn-1").read_bytes() == torn
    assert "trials.jsonl.torn-1" in caplog.text
    assert len(read_journal(path).results) == 4
    assert path.read_bytes().startswith(whole)


def test_a_line_without_its_newline_is_torn_even_if_it_reads_well(path):
    written(path, 3)
    path.write_bytes(path.read_bytes()[:-1])
    with Journal(path) as journal:
        assert len(journal.read()) == 2


def test_torn_lines_of_several_crashes_are_all_kept(path):
    written(path, 1)
    for index in (1, 2):
        with path.open("ab") as file:
            file.write(b"crash %d" % index)
        Journal(path).close()
    assert (path.parent / "trials.jsonl.torn-2").read_bytes() == b"crash 2"
    assert (path.parent / "trials.jsonl.torn-1").read_bytes() == b"crash 1"


def test_reading_alone_changes_nothing(path):
    written(path, 2)
    with path.open("ab") as file:
        file.write(b"torn")
    before = path.read_bytes()
    contents = read_journal(path)
    assert (len(contents.results), contents.torn) == (2, b"torn")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damaged", [b"{not json}", b'{"number": 1}', b"", b"[]", b'{"number": "x"}', b"\xff\xfe"]
)
def test_a_damaged_line_in_the_middle_is_refused_and_left_alone(path, damaged):
    written(path, 3)
    lines = path.read_bytes().split(b"\n")
    lines[1] = damaged
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(RunDirectoryError, match=r"trials\.jsonl is damaged at line 2"):
        Journal(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir() if "torn" in p.name] == []


def test_a_trial_that_is_there_twice_is_refused(path):
    written(path, 2)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(RunDirectoryError, match="line 3: trial 0 is there for the second time"):
        read_journal(path)


def test_of_a_trial_that_failed_and_was_tried_again_the_last_try_counts(path):
    failed = replace(result(0), status=TrialStatus.WORKER_DIED, metrics=None)
    with Journal(path) as journal:
        for each in (failed, result(1), failed, result(0)):
            journal.append(each)
        assert journal.read() == [result(1), result(0)]
    assert len(path.read_text().splitlines()) == 4
    assert list(read_journal(path).results) == [result(1), result(0)]
    with Journal(path) as journal:
        journal.append(failed)
    with pytest.raises(RunDirectoryError, match="line 5: trial 0 is there for the second time"):
        read_journal(path)


def test_a_missing_journal_is_an_empty_one(path):
    assert read_journal(path).results == ()
    with Journal(path) as journal:
        assert journal.read() == []


def test_a_second_writer_in_the_same_directory_is_refused(path):
    with Journal(path), pytest.raises(RunDirectoryError, match=f"process {os.getpid()} is writing"):
        Journal(path)
    Journal(path).close()


def test_the_lock_of_a_process_that_was_killed_holds_no_one_up(path):
    script = (
        "import os, sys; from pathlib import Path; from autocompress.search.journal import Journal;"
        "j = Journal(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -9
    Journal(path).close()


class FullDisk:
    """A file on a disk that has room for some bytes only."""

    def __init__(self, path, room):
        self._file = path.open("ab", buffering=0)
        self._room = room

    def write(self, data):
        if self._room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = min(self._room, len(data))
        self._room -= n
        return self._file.write(data[:n])

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_full_disk_is_one_clear_error_and_leaves_earlier_lines_intact(path):
    line = len(json.dumps(result(0).to_json(), separators=(",", ":"))) + 1
    journal = Journal(path, opener=lambda p: FullDisk(p, room=line + 40))
    journal.append(result(0))
    with pytest.raises(RunDirectoryError, match=r"No space is left.*The 1 trials before"):
        journal.append(result(1))
    journal.close()
    assert list(read_journal(path).results) == [result(0)]
    assert read_journal(path).torn == b""


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"cannot be written.*--out"):
        Journal(tmp_path / "file" / "trials.jsonl")
