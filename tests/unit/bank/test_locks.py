import subprocess
import sys

from autocompress.bank.locks import exclusive

HOLDER = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_only_one_holds_a_lock(tmp_path):
    path = tmp_path / "made" / "lock"
    with exclusive(path) as first:
        assert first
        with exclusive(path, wait=False) as second:
            assert not second
        with exclusive(tmp_path / "other", wait=False) as other:
            assert other
    with exclusive(path, wait=False) as again:
        assert again


def test_a_lock_is_released_by_an_exception(tmp_path):
    try:
        with exclusive(tmp_path / "lock"):
            raise RuntimeError
    except RuntimeError:
        pass
    with exclusive(tmp_path / "lock", wait=False) as held:
        assert held


def test_a_killed_holder_lets_go(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with exclusive(path, wait=False) as held:
            assert not held
        holder.kill()
    with exclusive(path, wait=False) as held:
        assert held


def test_where_nothing_can_be_written_everyone_may_go_on(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "lock"
    with exclusive(path) as one, exclusive(path, wait=False) as two:
        assert one
        assert two
