"""Time that a study leaves for what comes after it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reserve:
    """For measuring base, baselines and the front again, on other tokens.

    Attributes:
        seconds_each: wall time of one such measurement.
        most_members: of the front that are measured, beside base and baselines.
        at_once: measurements that run at the same time.
    """

    seconds_each: float
    most_members: int
    at_once: int = 1

    def seconds(self, n_baselines: int, n_members: int) -> float:
        """Wall time to leave.

        That of two more measurements is in it: the outputs that all are compared with, and a trial
        that began just before the time was up.

        Args:
            n_baselines: base and baselines.
            n_members: others on the front.
        """
        n_measured = 2 + n_baselines + min(n_members, self.most_members)
        return self.seconds_each * n_measured / self.at_once
