"""From model to exported, reloaded front member, through the command line, for each family."""

from __future__ import annotations

import json

import jsonschema
import pytest

from autocompress.fronts.document import front_schema

from .conftest import SMALL, most_mixed, reloads_as_claimed

FAMILIES = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "gemma3": "AutoModelForCausalLM",
    "mixtral": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "bert-encoder": "AutoModel",
    "bart": "AutoModelForSeq2SeqLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}
QUICK = ("llama",)


def _rows() -> list:
    return [
        pytest.param(f, a, id=f, marks=() if f in QUICK else pytest.mark.slow)
        for f, a in FAMILIES.items()
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("family", "auto_class"), _rows())
def test_a_member_of_the_front_reloads_with_the_bytes_and_the_quality_it_claims(
    family, auto_class, trained, cli, tmp_path
):
    model, out = trained(family), tmp_path / "run"
    searched = cli(
        "search", model, "--space", "joint", "--sampler", "guided", "--budget", "20 trials",
        "--out", out, *SMALL,
    )  # fmt: skip
    assert searched.status == 0, searched.err
    document = json.loads((out / "front.json").read_text())
    jsonschema.validate(document, front_schema())
    assert {b["name"] for b in document["baselines"]} >= {"uniform-8bit", "uniform-4bit"}
    assert len((out / "trials.jsonl").read_text().splitlines()) == 20
    assert "<html" in (out / "report.html").read_text()

    member = most_mixed(document["members"])
    assert len(set(member["allocation"].values())) > 1
    exported = tmp_path / "exported"
    reloads_as_claimed(cli, out, member, exported)

    import transformers

    import autocompress as ac

    ours = ac.load(exported)
    stock = getattr(transformers, auto_class).from_pretrained(exported)
    assert type(ours) is type(stock)
    assert ours.state_dict().keys() == stock.state_dict().keys()


def test_a_budget_of_time_that_preparation_uses_up_still_gives_a_front(trained, cli, tmp_path):
    out = tmp_path / "run"
    searched = cli(
        "search", trained("llama"), "--space", "quick", "--sampler", "random", "--budget", "0.01s",
        "--no-finalize", "--out", out, *SMALL,
    )  # fmt: skip
    assert searched.status == 0, searched.err
    assert "no time is left: only base and baselines are measured" in searched.err
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert all(trial["source"].startswith("baseline:") for trial in trials)
    document = json.loads((out / "front.json").read_text())
    assert len(document["baselines"]) == len(trials) - 1
    spent = document["study"]["budget_spent"]["seconds"]
    assert spent > sum(trial["seconds"] for trial in trials)
