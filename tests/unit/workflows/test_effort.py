"""What a search spends where nothing else is said."""

from __future__ import annotations

import importlib
import inspect
import typing
from dataclasses import fields, replace

import pytest

from autocompress.core.errors import UsageError
from autocompress.workflows.effort import EFFORTS, with_effort
from autocompress.workflows.settings import SearchSettings


def test_what_is_given_wins() -> None:
    found = with_effort("quick", {"space": None, "search_tokens": 7, "finalize": True})
    assert found == {**EFFORTS["quick"], "search_tokens": 7, "finalize": True}
    assert with_effort("standard", {"space": None, "budget": ("3 trials",)}) == {
        "budget": ("3 trials",)
    }


def test_quick_is_smaller_in_all_it_names() -> None:
    usual = SearchSettings("m")
    quick = replace(usual, **EFFORTS["quick"])
    assert quick.space == "quick"
    for name in ("calibration_tokens", "search_tokens", "report_tokens"):
        assert getattr(quick, name) < getattr(usual, name)
    assert usual.finalize
    assert not quick.finalize


def test_an_unknown_effort_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Unknown --effort 'quik'\. .*'quick'"):
        with_effort("quik", {})


def test_the_help_says_what_each_effort_takes() -> None:
    """The defaults that it prints are written by hand, because they depend on the effort."""
    usual = {field.name: field.default for field in fields(SearchSettings)}
    command = importlib.import_module("autocompress.cli.app").search
    hints = typing.get_type_hints(command, include_extras=True)
    assert set(EFFORTS["quick"]) <= set(inspect.signature(command).parameters)
    for name, value in EFFORTS["quick"].items():
        shown = hints[name].__metadata__[0].show_default
        assert shown == f"{said(usual[name])}; quick: {said(value)}"


def said(value: object) -> str:
    if isinstance(value, bool):
        return "finalize" if value else "no-finalize"
    return " ".join(value) if isinstance(value, tuple) else str(value)
