from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import jsonschema
import pytest
from front_examples import BASE_BYTES, make_document, make_member

from autocompress.core.errors import RunDirectoryError
from autocompress.fronts import FrontDocument, ReferencePoint, relative_hypervolume
from autocompress.fronts.document import front_schema


def test_members_are_what_nothing_beats_smallest_first(document):
    assert [m.id[0] for m in document.members] == ["a", "b", "c", "d"]
    assert [b.name for b in document.baselines] == ["uniform-4bit"]


def test_a_baseline_that_nothing_beats_is_a_member():
    uniform = make_member("uniform-8bit", 25, 0.999, is_baseline=True)
    document = make_document([make_member("a", 30, 0.99), make_member("b", 20, 0.9)], [uniform])
    assert [m.name or m.id[0] for m in document.members] == ["b", "uniform-8bit"]


def test_an_allocation_that_was_measured_twice_is_one_member():
    document = make_document([make_member("a", 30, 0.99), make_member("a", 30, 0.99)])
    assert len(document.members) == 1


def test_models_of_equal_size_and_quality_are_all_members():
    document = make_document([make_member("a", 30, 0.99), make_member("b", 30, 0.99)])
    assert len(document.members) == 2


def test_a_model_without_a_finite_quality_is_no_member():
    document = make_document([make_member("a", 30, math.nan), make_member("b", 40, 0.9)])
    assert [m.id[0] for m in document.members] == ["b"]


def test_exactly_one_member_is_the_knee(document):
    assert [m.id[0] for m in document.members if m.is_knee] == ["b"]
    assert document.knee is document.members[1]
    assert make_document([]).knee is None


def test_the_most_cost_efficient_member_respects_the_floor(document):
    best = document.most_cost_efficient
    assert best is not None
    assert best.id[0] == "b"
    assert make_document([make_member("a", 10, 0.5)], floor=0.9).most_cost_efficient is None


def test_the_hypervolume_is_the_area_between_front_and_reference_point():
    document = make_document([make_member("a", 20, 0.9), make_member("b", 50, 1.2)])
    # a: loss 0.1 at 0.2 of the bytes; b: above the base, so loss 0, at 0.5.
    assert document.hypervolume == pytest.approx(0.9 * 0.8 + 0.1 * 0.5)
    assert document.reference_point == ReferencePoint(1.0, {"storage_bytes": 1.0})


def test_members_outside_the_box_add_no_hypervolume():
    box = ReferencePoint(quality_loss=0.2, relative={"storage_bytes": 0.5})
    points = [(0.7, 10e6), (0.9, 60e6), (0.9, 40e6), (math.nan, 1e6)]
    assert relative_hypervolume(points, (BASE_BYTES,), box) == pytest.approx(0.1 * 0.1)
    assert relative_hypervolume([], (BASE_BYTES,), box) == 0.0


def test_a_document_reads_back_as_it_was_written(document, tmp_path):
    file = document.write(tmp_path)
    assert file == tmp_path / "front.json"
    assert FrontDocument.read(tmp_path) == document
    assert FrontDocument.read(file) == document


def test_the_file_has_the_published_fields_and_fits_the_schema(document, tmp_path):
    data = json.loads(document.write(tmp_path).read_text())
    jsonschema.Draft202012Validator.check_schema(front_schema())
    jsonschema.validate(data, front_schema())
    assert list(data) == [
        "schema_version", "optimize", "study", "base", "baselines", "reference_point",
        "hypervolume", "members", "comparisons",
    ]  # fmt: skip
    assert data["study"]["budget_spent"] == {"trials": 12, "seconds": 34.5, "tokens": 6789}
    assert data["study"]["data"] == "python-docs"
    assert set(data["base"]) == {"storage_bytes", "quality", "resources"}
    expected = {
        "id", "bits_per_weight", "storage_bytes", "size_reduction", "quality", "resources",
        "cost_efficiency", "allocation",
    }  # fmt: skip
    assert all(expected <= set(entry) for entry in data["members"] + data["baselines"])
    assert data["members"][0]["quality"] == {
        "retained": 0.55,
        "standard_error": 0.004,
        "metrics": {"perplexity": {"value": 20.5, "standard_error": 0.25}},
    }
    assert data["members"][0]["resources"]["latency_ms_per_token"] == {
        "value": 0.2, "unit": "ms", "origin": "analytic (roofline of x)",
    }  # fmt: skip


def test_a_number_that_is_not_finite_becomes_null_and_comes_back_as_nan(tmp_path):
    broken = make_member("broken", 5, math.nan, math.nan, math.inf, is_baseline=True)
    make_document([make_member("a", 10, 0.9)], [broken]).write(tmp_path)
    data = json.loads((tmp_path / "front.json").read_text())
    assert data["baselines"][0]["cost_efficiency"] is None
    assert data["baselines"][0]["quality"]["retained"] is None
    again = FrontDocument.read(tmp_path).baselines[0]
    assert math.isnan(again.cost_efficiency)
    assert math.isnan(again.quality.retained)
    assert math.isnan(again.latency_ms_per_token)


def test_a_missing_run_directory_is_answered_with_its_neighbours(document, tmp_path):
    (tmp_path / "minilm-joint").mkdir()
    document.write(tmp_path / "minilm-joint")
    with pytest.raises(RunDirectoryError, match="Did you mean 'minilm-joint'"):
        FrontDocument.read(tmp_path / "minilm-jiont")


def test_a_directory_without_a_front_is_told_what_to_do(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"holds front\.json, but .* --resume"):
        FrontDocument.read(tmp_path)


def test_a_file_in_place_of_the_directory_is_no_run_directory(tmp_path):
    (tmp_path / "trials.jsonl").write_text("{}")
    with pytest.raises(RunDirectoryError, match="no run directory"):
        FrontDocument.read(tmp_path / "trials.jsonl")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"schema_version": 1', "delimiter"),
        (b"\xff\xfe\x00", "decode"),
        (b"[]", "is not of type 'object'"),
        (b"{}", "required property"),
        (b'{"schema_version": NaN}', "NaN is not a JSON number"),
    ],
)
def test_a_damaged_file_is_reported_with_its_name(tmp_path, content, reason):
    (tmp_path / "front.json").write_bytes(content)
    with pytest.raises(RunDirectoryError, match=rf"front\.json is damaged \(.*{reason}"):
        FrontDocument.read(tmp_path)


def test_a_wrong_value_is_reported_with_its_place(document, tmp_path):
    data = document.to_json()
    data["members"][2]["storage_bytes"] = "many"
    (tmp_path / "front.json").write_text(json.dumps(data))
    with pytest.raises(RunDirectoryError, match="at members/2/storage_bytes: 'many'"):
        FrontDocument.read(tmp_path)


def test_an_unknown_field_is_refused(document, tmp_path):
    data = document.to_json()
    data["members"][0]["colour"] = "red"
    (tmp_path / "front.json").write_text(json.dumps(data))
    with pytest.raises(RunDirectoryError, match="colour"):
        FrontDocument.read(tmp_path)


def test_a_newer_version_asks_for_an_upgrade(document, tmp_path):
    (tmp_path / "front.json").write_text(json.dumps({**document.to_json(), "schema_version": 2}))
    with pytest.raises(RunDirectoryError, match=r"version 2, but .* up to 1\. .*upgrade"):
        FrontDocument.read(tmp_path)


def test_a_full_disk_leaves_the_earlier_file_as_it_was(document, tmp_path, monkeypatch):
    document.write(tmp_path)
    before = (tmp_path / "front.json").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunDirectoryError, match=r"No space left on device.*untouched"):
        make_document([]).write(tmp_path)
    assert (tmp_path / "front.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["front.json"]


def test_writing_into_a_missing_directory_is_an_error_that_says_so(document, tmp_path):
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        document.write(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_the_schema_ships_with_the_package():
    import autocompress.fronts

    assert (Path(autocompress.fronts.__file__).parent / "front.schema.json").is_file()
