"""What a resumed search may change, and what it says of the rest."""

import re
from dataclasses import fields, replace

import pytest
import typer

from autocompress.cli import app
from autocompress.core.errors import UsageError
from autocompress.workflows.settings import SearchSettings, require_same_study

OLD = SearchSettings("m", driver="ray")
SAMPLES = {str: "other", int: 77, float: 0.5, bool: True, tuple: ("77",), type(None): "5"}


def changed(name: str) -> SearchSettings:
    """The old settings with one other value, whether or not it means anything."""
    new, old = replace(OLD), getattr(OLD, name)
    value = not old if isinstance(old, bool) else SAMPLES[type(old)]
    object.__setattr__(new, name, value)
    return new


def refusal(name: str) -> str:
    try:
        require_same_study(OLD, changed(name))
    except UsageError as error:
        return str(error)
    return ""


NAMES = [f.name for f in fields(SearchSettings)]
MAY = [name for name in NAMES if not refusal(name)]


def test_a_refusal_names_what_differs_and_every_option_that_may_change():
    said = refusal("seed")
    assert "these differ: --seed (was 0, now 77). Only " in said
    named = re.findall(r"--[a-z-]+", said.partition("Only ")[2].partition(" may change")[0])
    assert {"--budget", "--trial-timeout", "--gpus-per-worker", "--finalize"} < set(named)
    assert len(named) == len(MAY) < len(NAMES)


def test_each_setting_is_called_what_the_command_line_calls_it():
    parameters = typer.main.get_command(app).commands["search"].params
    options = {option for parameter in parameters for option in parameter.opts}
    for name in set(NAMES) - set(MAY):
        said = refusal(name)
        assert set(re.findall(r"(\S+) \(was ", said)) <= options
        assert set(re.findall(r"(--[a-z-]+)", said)) <= options


def test_a_wrong_value_is_told_by_the_option_that_gave_it():
    with pytest.raises(UsageError, match="Unknown --token-weighting 'squared'"):
        SearchSettings("m", token_weighting="squared")
