from __future__ import annotations

import pytest

from autocompress.core import Registry
from autocompress.core.errors import (
    AutocompressError,
    CheckpointError,
    DataError,
    NoAnswerError,
    RunDirectoryError,
    UnknownNameError,
    UsageError,
    nearest,
)


@pytest.fixture
def registry():
    registry: Registry[int] = Registry("method")
    for number, name in enumerate(["rtn", "gptq", "magnitude"]):
        registry.add(name, number)
    return registry


def test_a_registry_keeps_the_order_of_registration(registry):
    assert list(registry) == ["rtn", "gptq", "magnitude"]
    assert len(registry) == 3
    assert registry["gptq"] == 1
    assert "gptq" in registry
    assert "awq" not in registry


def test_register_is_a_decorator_that_leaves_the_item_as_it_is(registry):
    @registry.register("double")
    def double(x):
        return 2 * x

    assert registry["double"] is double
    assert double(2) == 4


def test_a_mistyped_name_is_answered_with_the_nearest_one(registry):
    with pytest.raises(
        UnknownNameError,
        match=r"Unknown method 'magnitud'\. Did you mean 'magnitude'\? "
        r"Available: gptq, magnitude, rtn\.",
    ):
        registry["magnitud"]


def test_a_name_unlike_any_other_gets_the_list_alone(registry):
    with pytest.raises(UnknownNameError, match=r"Unknown method 'zzz'\. Available: gptq"):
        registry["zzz"]


def test_a_name_is_registered_once(registry):
    with pytest.raises(UsageError, match="'rtn' is already registered by 0"):
        registry.add("rtn", 9)


def test_plugins_are_loaded_on_the_first_look_up_and_only_once(monkeypatch):
    registry: Registry[str] = Registry("method", "autocompress.methods")
    loads = []

    class Point:
        name = "outside"
        value = "plugin"
        dist = None

        def load(self):
            loads.append(1)
            registry.add("outside", "plugin")

    monkeypatch.setattr("autocompress.core.registry.entry_points", lambda group: [Point()])
    assert loads == []
    assert registry["outside"] == "plugin"
    assert "outside" in registry
    assert loads == [1]


def test_long_lists_of_names_are_cut_short():
    text = nearest("x", [f"name{i:03}" for i in range(50)])
    assert text.endswith("name019, ... (50 in all).")
    assert nearest("x", []) == "Available: none."


@pytest.mark.parametrize(
    ("error", "builtin", "status"),
    [
        (UsageError, ValueError, 2),
        (DataError, ValueError, 2),
        (UnknownNameError, ValueError, 2),
        (RunDirectoryError, OSError, 2),
        (CheckpointError, ValueError, 2),
        (NoAnswerError, LookupError, 1),
    ],
)
def test_errors_are_the_builtin_that_callers_expect_and_know_their_exit_status(
    error, builtin, status
):
    assert issubclass(error, builtin)
    assert issubclass(error, AutocompressError)
    assert error.exit_status == status
    assert str(error("one line")) == "one line"
