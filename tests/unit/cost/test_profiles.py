"""Device profiles."""

from __future__ import annotations

import pytest

from autocompress.core.errors import UnknownNameError, UsageError
from autocompress.cost import DEFAULT_PROFILE, PROFILES, DeviceProfile


def test_shipped_profiles_are_named_after_their_key_and_say_where_they_are_from():
    assert DEFAULT_PROFILE in PROFILES
    for name in PROFILES:
        profile = PROFILES[name]
        assert profile.name == name
        assert len(profile.origin) > 20
        # Of every device here arithmetic is faster than reading its operands.
        assert profile.flops_per_second > profile.bytes_per_second


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'h100-sxm'"):
        PROFILES["h100"]


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_rates_must_be_positive_and_finite(value):
    with pytest.raises(UsageError, match="bytes_per_second of device profile 'x'"):
        DeviceProfile("x", 1e9, value, 1, "made up")


def test_a_profile_is_json_by_field_name():
    assert DeviceProfile("x", 1e9, 1e8, 1, "made up").to_json() == {
        "name": "x",
        "flops_per_second": 1e9,
        "bytes_per_second": 1e8,
        "memory_bytes": 1,
        "origin": "made up",
    }
