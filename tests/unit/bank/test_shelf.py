import os
import random
import time

import pytest
import torch

from autocompress.bank import shelf as module
from autocompress.bank.entries import DamagedEntryError
from autocompress.bank.shelf import DEFAULT_CAPACITY_BYTES, Shelf
from autocompress.core import Scheme
from autocompress.methods import CompressedWeight

SCHEME = Scheme.parse("rtn(bits=8)")


def entry(n=2000, value=0):
    return CompressedWeight(
        (1, n), torch.float32, SCHEME, {"packed": torch.full((n,), value, dtype=torch.uint8)}
    )


def key(i):
    return f"{i:02x}" * 4


def total(root):
    return sum(p.stat().st_size for p in root.glob("??/*"))


ONE = 2300  # bytes of a file with 2000 bytes of content, at most


def age(shelf, i, seconds):
    moment = time.time() - seconds
    os.utime(shelf.path(key(i)), (moment, moment))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "bank"


def test_the_directory_never_exceeds_its_bound(root):
    shelf = Shelf(root, 10 * ONE)
    sizes = random.Random(0)
    for i in range(60):
        assert shelf.write(key(i), entry(sizes.randrange(1, 4000)))
        assert total(root) <= 10 * ONE
        assert shelf.holds(key(i))
    assert total(root) > 5 * ONE


def test_many_writers_stay_within_the_bound_too(root):
    shelves = [Shelf(root, 40 * ONE) for _ in range(4)]
    for i in range(200):
        shelves[i % 4].write(key(i), entry())
        assert total(root) <= 41 * ONE


def test_what_was_used_longest_ago_goes_first_whoever_used_it(root):
    writer, reader = (Shelf(root, int(4.4 * ONE)) for _ in range(2))
    for i in range(3):
        writer.write(key(i), entry())
        age(writer, i, 100 - i)
    reader.read(key(0), SCHEME)
    writer.write(key(3), entry())
    writer.write(key(4), entry())
    assert [writer.holds(key(i)) for i in range(5)] == [True, False, True, True, True]


def test_an_entry_is_verified_once_per_process_and_not_touched_at_each_reading(root, monkeypatch):
    Shelf(root, 100 * ONE).write(key(0), entry())
    verified = []
    real = module.read_entry

    def counting(path, scheme, *, verify):
        verified.append(verify)
        return real(path, scheme, verify=verify)

    monkeypatch.setattr(module, "read_entry", counting)
    shelf = Shelf(root, 100 * ONE)
    shelf.read(key(0), SCHEME)
    age(shelf, 0, 50)
    before = shelf.path(key(0)).stat().st_mtime
    shelf.read(key(0), SCHEME)
    assert verified == [True, False]
    assert shelf.path(key(0)).stat().st_mtime == before


def test_what_a_long_lived_process_reads_stays_and_what_it_no_longer_reads_goes(root, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    worker, writer = Shelf(root, 100 * ONE), Shelf(root, int(4.4 * ONE))
    for i in range(4):
        writer.write(key(i), entry())
        worker.read(key(i), SCHEME)
        age(writer, i, 100 - i)
    now[0] = 61.0
    worker.read(key(0), SCHEME)
    writer.write(key(4), entry())
    assert [writer.holds(key(i)) for i in range(5)] == [True, False, True, True, True]


def test_a_damaged_entry_is_never_taken_for_verified(root):
    shelf = Shelf(root, 100 * ONE)
    shelf.write(key(0), entry())
    data = bytearray(shelf.path(key(0)).read_bytes())
    data[-1] ^= 1
    shelf.path(key(0)).write_bytes(data)
    for _ in range(2):
        with pytest.raises(DamagedEntryError, match="checksum"):
            shelf.read(key(0), SCHEME)


def test_a_mapped_entry_survives_its_eviction(root):
    shelf = Shelf(root, 2 * ONE)
    shelf.write(key(0), entry(value=7))
    mapped = shelf.read(key(0), SCHEME)
    age(shelf, 0, 50)
    for i in range(1, 4):
        shelf.write(key(i), entry())
    assert not shelf.holds(key(0))
    assert torch.equal(mapped.tensors["packed"], entry(value=7).tensors["packed"])


def test_an_entry_above_the_bound_is_not_kept(root):
    shelf = Shelf(root, 1999)
    assert not shelf.write(key(0), entry(2000))
    assert not shelf.write(key(0), entry(1990))  # its header is what exceeds the bound
    assert total(root) == 0


def test_temporary_files_of_dead_writers_are_removed_and_those_of_living_ones_are_not(root):
    shelf = Shelf(root, 10 * ONE)
    shelf.write(key(0), entry())
    old, new = (shelf.path(key(0)).with_name(f".{name}.tmp") for name in ("old", "new"))
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    for i in range(1, 12):
        shelf.write(key(i), entry())
    assert not old.exists()
    assert new.exists()


def test_the_default_bound_leaves_half_of_a_small_disk_free(root, monkeypatch):
    free = 1000 * ONE
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    assert Shelf(root, None).capacity() == free // 2
    free = 10**15
    assert Shelf(root, None).capacity() == DEFAULT_CAPACITY_BYTES


def test_locks_are_few_however_many_layers_there_are(root):
    shelf = Shelf(root, 10 * ONE)
    for i in range(50):
        with shelf.building(f"layer {i}") as held:
            assert held
    names = {path.name for path in (root / ".locks").iterdir()}
    assert all(len(name) == 3 for name in names)
