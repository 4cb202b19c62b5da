"""A search judges embeddings by the pooling of the model's own pipeline, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from autocompress.core import digest
from autocompress.core.errors import ModelError, UsageError
from autocompress.models.curvature_pass import TEMPERING
from autocompress.report.tables import evaluation_table
from autocompress.testing.tiny_models import save_tiny, tiny_model
from autocompress.workflows.evaluate import evaluate_model
from autocompress.workflows.export import require_same_inputs
from autocompress.workflows.search import study_record
from autocompress.workflows.session import open_session
from autocompress.workflows.settings import SearchSettings, StudyRecord

MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pooling")
    model = tiny_model("bert-encoder")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "attention" in name and weight.ndim == 2:
                weight.mul_(10)  # an untrained first token hardly looks at the text
    save_tiny("bert-encoder", folder / "model", model=model)
    words = [json.dumps({"text": f"{i} words to read, and {i * 7} others."}) for i in range(99)]
    (folder / "text.jsonl").write_text("\n".join(words))
    return folder


def pool_by(folder, mode):
    """Give the model a pipeline."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (folder / "model" / "1_Pooling").mkdir(exist_ok=True)
    (folder / "model" / "modules.json").write_text(
        json.dumps([{"path": p, "type": f"sentence_transformers.models.{t}"} for p, t in modules])
    )
    flags = {flag: name == mode for name, flag in MODES.items()} | {"pooling_mode_x": True}
    config = flags if mode in MODES else {"pooling_mode": mode}
    (folder / "model" / "1_Pooling" / "config.json").write_text(json.dumps(config))


def opened(folder, mode):
    pool_by(folder, mode)
    settings = SearchSettings(
        str(folder / "model"), data=str(folder / "text.jsonl"), sequence_length=16, dtype="float32",
        calibration_tokens=64, search_tokens=64, report_tokens=64, space="quick",
    )  # fmt: skip
    return open_session(settings, folder / "cache")


def test_the_embedding_is_the_first_tokens_where_the_model_says_so(folder):
    session = opened(folder, "cls")
    split, module = session.splits.search, session.base.module
    found = session.reference(module, split, 4)["embeddings"]
    hidden = module(input_ids=split.examples[0]["input_ids"][None]).last_hidden_state
    expected = torch.nn.functional.normalize(hidden[0, 0], dim=0)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_curvature_of_two_poolings_is_kept_apart_and_that_of_the_mean_where_it_was(folder):
    digests = {}
    for mode in ("cls", "mean"):
        session = opened(folder, mode)
        digests[mode] = session.searched_curvature.digest
    assert digests["cls"] != digests["mean"]
    facts = ["curvature", 1, session.base.digest, session.splits.calibration.digest, "float32"]
    name = digest([*facts, False, session.settings.seed, TEMPERING])
    folders = {path.name for path in Path(folder / "cache" / "curvature").iterdir()}
    assert len(folders) == 2
    assert name in folders  # as before poolings were read


def test_an_unknown_pooling_is_refused(folder):
    with pytest.raises(ModelError, match=r"pipeline says 'attention'.*Next step"):
        opened(folder, "attention")


def test_the_pooling_is_recorded_and_a_run_of_another_one_is_not_gone_on_with(folder):
    session = opened(folder, "cls")
    record = study_record(session)
    assert record.resolved["pooling"] == "cls"
    require_same_inputs(session, record)
    now = opened(folder, "mean")
    for refuse in (require_same_inputs, study_record):
        with pytest.raises(UsageError, match=r"pooling 'cls', but the pipeline .* says 'mean'"):
            refuse(now, record)
    # a run of a version that pooled by the mean and did not say so
    resolved = {k: v for k, v in record.resolved.items() if k != "pooling"}
    old = StudyRecord(record.settings, resolved)
    require_same_inputs(now, old)
    with pytest.raises(UsageError, match=r"pooling 'mean', but the pipeline .* says 'cls'"):
        study_record(session, old)


def test_an_evaluation_says_how_it_pooled(folder):
    pool_by(folder, "cls")
    result = evaluate_model(
        str(folder / "model"), data=str(folder / "text.jsonl"), tokens=64
    ).to_json()
    assert result["pooling"] == "cls"
    console = Console(width=100)
    with console.capture() as captured:
        console.print(evaluation_table(result))
    assert "pooling" in captured.get()
