"""The verbs of the Python package are those of the command line."""

from inspect import signature

import pytest

import autocompress as ac
from autocompress.cli import app

COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands}


def defaults(verb, without):
    parameters = signature(verb).parameters.values()
    return {p.name: p.default for p in parameters if p.name != without}


@pytest.mark.parametrize("name", ["profile", "solve"])
def test_a_verb_takes_what_its_command_takes_and_defaults_to_the_same(name):
    assert defaults(getattr(ac, name), "progress") == defaults(COMMANDS[name], "as_json")


def test_each_public_name_can_be_imported():
    assert all(getattr(ac, name) is not None for name in ac.__all__)
