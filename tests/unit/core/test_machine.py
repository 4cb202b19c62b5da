"""Cores of a machine that this process may use."""

import os
import sys

import pytest

from autocompress.core import machine


@pytest.mark.parametrize(
    ("stated", "cores"),
    [("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", sys.maxsize)],
)
def test_a_quota_counts_whole_cores(tmp_path, stated, cores):
    file = tmp_path / "cpu.max"
    file.write_text(stated)
    assert machine.cpu_quota(file) == cores


def test_no_control_group_is_no_quota(tmp_path):
    assert machine.cpu_quota(tmp_path / "missing") == sys.maxsize


@pytest.mark.parametrize(("affine", "quota", "cores"), [(12, 64, 12), (12, 3, 3), (1, 1, 1)])
def test_usable_cores_are_what_affinity_and_quota_leave(monkeypatch, affine, quota, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affine)), raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.usable_cores() == cores


def test_a_system_without_affinities_has_all_its_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(machine, "cpu_quota", lambda: sys.maxsize)
    assert machine.usable_cores() == 6
