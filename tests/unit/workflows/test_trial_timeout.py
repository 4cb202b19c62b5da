"""A limit on trials that nothing would keep is refused."""

import pytest

from autocompress.core.errors import UsageError
from autocompress.workflows.settings import SearchSettings


@pytest.mark.parametrize("limit", [0.0, -5.0, float("nan"), float("inf")])
@pytest.mark.parametrize("driver", ["local", "ray"])
def test_a_trial_may_take_more_than_no_time(driver, limit):
    with pytest.raises(UsageError, match=rf"more than 0 seconds, but got {limit:g}\. Next step"):
        SearchSettings("m", driver=driver, trial_timeout_seconds=limit)


def test_the_local_driver_cannot_stop_a_trial():
    with pytest.raises(UsageError, match=r"cannot stop one.*--trial-timeout 30 .*--driver ray"):
        SearchSettings("m", trial_timeout_seconds=30)
    assert SearchSettings("m", driver="ray", trial_timeout_seconds=30).trial_timeout_seconds == 30


def test_an_older_run_with_a_limit_that_was_ignored_is_still_read():
    data = SearchSettings("m").to_json() | {"trial_timeout_seconds": 30.0}
    assert SearchSettings.from_json(data) == SearchSettings("m")
    kept = SearchSettings("m", driver="ray", trial_timeout_seconds=30.0)
    assert SearchSettings.from_json(kept.to_json()) == kept
