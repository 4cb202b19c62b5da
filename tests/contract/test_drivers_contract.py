"""Every driver is held to the same contract; Ray's also survives what kills a process."""

from contextlib import closing
from dataclasses import replace

import pytest

from autocompress.core import Bar, Scheme, TrialStatus
from autocompress.drivers.local import LocalDriver
from autocompress.search.racing import Racing
from autocompress.search.run_trial import run_trial
from autocompress.testing.driver_contract import (
    WIDTHS,
    DriverContract,
    scripted,
    scripted_context,
    value_of,
)


@pytest.fixture(scope="session")
def one_ray():
    from autocompress.drivers.ray import start_ray, stop_ray

    start_ray(workers=2)
    yield
    stop_ray()


class TestLocalDriver(DriverContract):
    def make_driver(self, context):
        return LocalDriver(context)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
class TestRayDriver(DriverContract):
    def make_driver(self, context):
        from autocompress.drivers.ray import RayDriver

        return RayDriver(context, workers=2)

    def test_a_worker_that_dies_is_replaced_and_its_trial_tried_again(self, tmp_path):
        requests = [scripted(0, "crash_once"), scripted(1, "rtn(bits=4,group_size=16)")]
        with closing(self.make_driver(scripted_context(tmp_path))) as driver:
            results = self.results(driver, requests)
        assert [(r.status, r.attempts) for r in results] == [
            (TrialStatus.NOT_FINITE, 2),
            (TrialStatus.COMPLETE, 1),
        ]

    def test_a_trial_that_always_kills_its_worker_is_given_up(self, tmp_path):
        requests = [scripted(0, "crash"), *(scripted(i, f"rtn(bits={i + 1})") for i in range(1, 4))]
        with closing(self.make_driver(scripted_context(tmp_path))) as driver:
            results = self.results(driver, requests)
        assert (results[0].status, results[0].attempts) == (TrialStatus.WORKER_DIED, 3)
        assert "3 attempts" in results[0].error
        assert all(r.is_complete for r in results[1:])

    def test_a_trial_that_hangs_is_stopped_at_the_time_limit(self, tmp_path):
        from autocompress.drivers.ray import RayDriver

        context = scripted_context(tmp_path)
        with closing(RayDriver(context, workers=2, trial_timeout_seconds=1.5)) as driver:
            results = self.results(driver, [scripted(0, "hang"), scripted(1, "rtn(bits=4)")])
        assert [r.status for r in results] == [TrialStatus.TIMED_OUT, TrialStatus.COMPLETE]
        assert "1.5 s" in results[0].error
        assert results[0].seconds >= 1.5

    def test_after_a_write_to_shared_memory_all_workers_start_from_clean_memory(self, tmp_path):
        sound = [scripted(i, f"rtn(bits={i + 1},group_size=16)") for i in range(1, 5)]
        with closing(self.make_driver(scripted_context(tmp_path / "bank"))) as driver:
            results = self.results(driver, [scripted(0, "scribble"), *sound])
        with closing(LocalDriver(scripted_context(tmp_path / "other"))) as local:
            expected = self.results(local, sound)
        assert results[0].status is TrialStatus.FAILED
        assert [value_of(r) for r in results[1:]] == [value_of(r) for r in expected]

    def test_a_worker_that_dies_over_a_layer_is_replaced_and_the_layer_tried_again(self, tmp_path):
        context = scripted_context(tmp_path)
        wanted = {"first": (Scheme.parse("crash_once"), *WIDTHS), "second": WIDTHS}
        with closing(self.make_driver(context)) as driver:
            assert sorted(driver.fill(wanted)) == ["first", "second"]
        assert all(context.bank.path(name, s).is_file() for name in wanted for s in WIDTHS)

    def test_a_layer_that_always_kills_its_worker_is_left_to_who_asks(self, tmp_path):
        context = scripted_context(tmp_path)
        wanted = {"first": (Scheme.parse("crash"), *WIDTHS), "second": WIDTHS}
        with closing(self.make_driver(context)) as driver:
            assert sorted(driver.fill(wanted)) == ["first", "second"]
            assert all(r.is_complete for r in self.results(driver, [scripted(0, "rtn(bits=4)")]))
        assert all(context.bank.path("second", scheme).is_file() for scheme in WIDTHS)
        assert not context.bank.path("first", WIDTHS[0]).is_file()

    def test_a_bank_directory_that_cannot_be_used_is_done_without(self, tmp_path):
        blocked = tmp_path / "file"
        blocked.write_text("a file where the bank's directory should be")
        with closing(self.make_driver(scripted_context(blocked))) as driver:
            results = self.results(driver, [scripted(0, "rtn(bits=4)")])
        assert results[0].is_complete


def test_a_ray_worker_measures_what_this_process_measures(one_ray, tmp_path):
    """The one quick Ray test of the default suite."""
    from autocompress.drivers.ray import RayDriver

    racing = Racing(confidence=0.95)
    one, other = (scripted_context(tmp_path / name).with_racing(racing) for name in "ab")
    requests = [scripted(i, f"rtn(bits={b},group_size=16)") for i, b in enumerate((2, 4, 8))]
    bar = Bar(2, run_trial(requests[2], context=other).damages)
    requests.append(replace(requests[0], number=3, bar=bar))
    with closing(RayDriver(one, workers=1)) as driver:
        assert list(driver.fill({"second": WIDTHS})) == ["second"]
        results = list(driver.run(iter(requests)))
    assert all(one.bank.path("second", scheme).is_file() for scheme in WIDTHS)
    expected = list(LocalDriver(other).run(iter(requests)))
    assert [value_of(r) for r in results] == [value_of(r) for r in expected]
    assert [r.status for r in results] == [*[TrialStatus.COMPLETE] * 3, TrialStatus.EARLY_STOPPED]


def test_a_worker_that_no_node_can_hold_is_refused(one_ray, tmp_path):
    from autocompress.core.errors import UsageError
    from autocompress.drivers.ray import RayDriver

    with pytest.raises(UsageError, match=r"1e\+06 GPUs.*--gpus-per-worker"):
        RayDriver(scripted_context(tmp_path), workers=1, gpus_per_worker=1e6)
