import pytest

from autocompress.search import clock


class Time:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def ticking(monkeypatch):
    """The time of `Clock`, which goes on where a test says so."""
    monkeypatch.setattr(clock, "time", Time())
    return clock.time
