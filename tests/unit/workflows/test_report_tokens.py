"""Measuring on report tokens: interrupted, failed, and gone on with."""

import pytest

from autocompress.core import (
    BASE_ALLOCATION,
    Allocation,
    Measurement,
    Metrics,
    Quality,
    Resource,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.core.errors import TrialError
from autocompress.search import Spent, read_journal
from autocompress.workflows.publish import (
    REPORT_JOURNAL,
    front_document,
    measure_on_report_tokens,
    shortlist,
)
from autocompress.workflows.session import QUIET

METRICS = Metrics(
    Quality(1.0, 0.0, Measurement(0.1, 0.0), {}, 1),
    {"storage_bytes": Resource(1.0, "bytes", "analytic")},
)
REQUESTS = [TrialRequest(n, BASE_ALLOCATION, "baseline:base") for n in range(3)]


class Driver:
    """Answers with a status for each trial; None interrupts."""

    n_workers = 1

    def __init__(self, *statuses):
        self._statuses = statuses
        self.asked = []

    def run(self, requests):
        for request, status in zip(requests, self._statuses, strict=False):
            if status is None:
                raise KeyboardInterrupt
            self.asked.append(request.number)
            yield TrialResult(request, status, METRICS)


def measure(driver, folder):
    return measure_on_report_tokens(REQUESTS, driver, folder, QUIET)


def test_an_interrupt_leaves_what_is_measured_and_says_so(tmp_path):
    results, in_part = measure(Driver(TrialStatus.COMPLETE, None), tmp_path)
    assert ([r.request.number for r in results], in_part) == ([0], True)


def test_what_is_complete_stays_and_what_failed_is_tried_again(tmp_path):
    first = Driver(TrialStatus.COMPLETE, TrialStatus.OUT_OF_MEMORY, TrialStatus.COMPLETE)
    assert measure(first, tmp_path)[1] is False
    again = Driver(TrialStatus.COMPLETE)
    results, in_part = measure(again, tmp_path)
    assert (again.asked, in_part) == ([1], False)
    assert {r.request.number for r in results if r.is_complete} == {0, 1, 2}
    assert read_journal(tmp_path / REPORT_JOURNAL).results == tuple(results)


def test_a_base_that_failed_in_the_search_is_tried_again():
    failed = TrialResult(REQUESTS[0], TrialStatus.WORKER_DIED, error="gone")
    other = Allocation.from_json({"up": "rtn(bits=4)"})
    found = TrialResult(TrialRequest(5, other, "sampler:guided"), TrialStatus.COMPLETE, METRICS)
    assert [r.number for r in shortlist([failed, found])] == [0, 5]


@pytest.mark.parametrize(
    ("measured", "how"),
    [
        ([], "that did not finish. Next step: the same command with --resume"),
        (
            [TrialResult(REQUESTS[0], TrialStatus.OUT_OF_MEMORY, error="no room")],
            r"that failed: no room \(out_of_memory\). Next step: the same command with --resume",
        ),
    ],
)
def test_a_front_without_its_base_says_why_and_what_helps(measured, how):
    with pytest.raises(TrialError, match=how):
        front_document(None, None, measured, Spent(), searched={})
