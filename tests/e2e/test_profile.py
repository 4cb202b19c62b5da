"""`autocompress profile` from a saved model to a table, a page and one clear error."""

import json

import pytest

from autocompress.cli import run
from autocompress.testing.tiny_models import save_tiny

TOKENS = ["--calibration-tokens", "256", "--search-tokens", "128", "--sequence-length", "32"]
QUICK = ["--space", "quick", *TOKENS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny("llama", tmp_path_factory.mktemp("model") / "llama"))


def test_a_profile_is_a_document_and_a_self_contained_page(model, tmp_path, capsys):
    assert run(["profile", model, *QUICK, "--json", "--out", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    table = document["table"]
    assert document["unit"] == "kl_nats_per_token"
    assert document["tokens"] == 128
    assert len(table["names"]) == len(table["damage"]) > 0
    assert max(max(damages) for damages in table["damage"]) > 0
    page = (tmp_path / "sensitivity.html").read_text()
    assert "<svg" in page
    assert "http" not in page
    assert page.count('text-anchor="end"') == len(table["names"])


def test_the_table_names_every_layer(model, capsys):
    assert run(["profile", model, *QUICK]) == 0
    assert "Predicted damage of" in capsys.readouterr().out


def test_the_python_twin_finds_the_same(model, tmp_path, capsys):
    import autocompress as ac

    assert run(["profile", model, *QUICK, "--json"]) == 0
    found = ac.profile(
        model, space="quick", calibration_tokens=256, search_tokens=128, sequence_length=32,
        out=str(tmp_path / "out"),
    )  # fmt: skip
    shown = capsys.readouterr()
    assert found.to_json() == json.loads(shown.out)
    assert len(found.table.names) == len(found.table.damage)
    assert (tmp_path / "out" / "sensitivity.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/model"], "no/such/model"),
        (["MODEL", "--space", "quik"], "Did you mean 'quick'"),
        (["MODEL", "--calibration-tokens", "0"], "--calibration-tokens must be at least 1"),
        (["MODEL", "--task", "causal"], "causal-lm"),
        (["MODEL", *QUICK, "--out", "FILE"], "--out must be a folder"),
    ],
)
def test_a_mistake_is_one_clear_error(model, tmp_path, capsys, arguments, words):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    given = [{"MODEL": model, "FILE": str(blocked)}.get(a, a) for a in arguments]
    assert run(["profile", *given]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("error:") == 1
