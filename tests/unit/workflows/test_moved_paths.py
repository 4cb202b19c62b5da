"""A run is found, with its model and data, from any working directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from autocompress.workflows.settings import SearchSettings, StudyRecord, require_same_study

RELATIVE = {
    "model": "models/mine", "data": "text.jsonl", "space": "my.yaml", "device_profile": "here.json",
    "cache": "shared",
}  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose search was started in it, and a working directory elsewhere."""
    project = tmp_path / "project"
    for folder in ("models/mine", "runs/one", "shared"):
        (project / folder).mkdir(parents=True)
    for file in ("text.jsonl", "my.yaml", "here.json"):
        (project / file).touch()
    monkeypatch.chdir(project)
    StudyRecord(SearchSettings(**RELATIVE), {}).write(Path("runs/one"))
    (tmp_path / "elsewhere").mkdir()
    return project


def paths(record):
    return {name: getattr(record.settings, name) for name in RELATIVE}


def test_where_the_search_was_started_its_paths_stay_as_they_were_typed(project):
    assert paths(StudyRecord.read(Path("runs/one"))) == RELATIVE


def test_from_elsewhere_paths_lead_to_the_same_files(project, monkeypatch):
    monkeypatch.chdir(project.parent / "elsewhere")
    record = StudyRecord.read(Path("../project/runs/one"))
    assert paths(record) == {name: f"../project/{path}" for name, path in RELATIVE.items()}
    typed = {name: f"../project/{path}" for name, path in RELATIVE.items()}
    require_same_study(record.settings, SearchSettings(**typed))


def test_a_project_may_be_moved_as_a_whole(project, monkeypatch):
    monkeypatch.chdir(project.parent / "elsewhere")
    shutil.move(project, project.parent / "moved")
    record = StudyRecord.read(Path("../moved/runs/one"))
    assert record.settings.model == "../moved/models/mine"


def test_names_stay_names(project, monkeypatch):
    names = {"model": "org/model", "data": "python-docs", "space": "joint", "cache": None}
    for folder in ("python-docs", "joint"):
        (project / folder).mkdir()
    StudyRecord(SearchSettings(**names), {}).write(Path("runs/one"))
    monkeypatch.chdir(project.parent / "elsewhere")
    settings = StudyRecord.read(project / "runs" / "one").settings
    assert {name: getattr(settings, name) for name in names} == names


def test_runs_of_older_versions_are_read_as_they_are(project, monkeypatch):
    file = project / "runs" / "one" / "study.yaml"
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("started_in")]
    assert len(kept) == len(lines) - 1
    file.write_text("\n".join(kept), encoding="utf-8")
    monkeypatch.chdir(project.parent / "elsewhere")
    assert paths(StudyRecord.read(project / "runs" / "one")) == RELATIVE
