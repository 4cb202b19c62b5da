from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from autocompress.core import Objectives
from autocompress.core.errors import NoAnswerError
from autocompress.fronts import FrontDocument
from autocompress.report.picture import (
    HEIGHT,
    WIDTH,
    Scale,
    front_svg,
    linear_ticks,
    log_ticks,
    write_picture,
)

SVG = "{http://www.w3.org/2000/svg}"


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def test_the_picture_is_svg_with_every_member_baseline_and_the_base(document):
    root = ET.fromstring(front_svg(document, lowest_quality=0.1))
    circles = [e for e in root.iter(f"{SVG}circle") if e.get("class") == "member"]
    diamonds = [e for e in root.iter(f"{SVG}rect") if e.get("class") == "baseline"]
    assert len(circles) == len(document.members) + 1  # and the legend's
    assert len(diamonds) == len(document.baselines) + 1
    assert any(text.startswith("base model, ") for text in texts(root))
    assert any(text.startswith("knee: ") for text in texts(root))
    assert any(text.startswith("best cost efficiency: ") for text in texts(root))


def test_broken_members_are_left_out_by_default(document):
    root = ET.fromstring(front_svg(document))
    circles = [e for e in root.iter(f"{SVG}circle") if e.get("class") == "member"]
    half = max(m.quality.retained for m in document.members) / 2
    assert len(circles) - 1 == sum(m.quality.retained >= half for m in document.members)


def test_everything_lies_inside_the_frame(document):
    root = ET.fromstring(front_svg(document))
    for element in root.iter(f"{SVG}circle"):
        assert 0 <= float(element.get("cx")) <= WIDTH
        assert 0 <= float(element.get("cy")) <= HEIGHT


def test_a_front_of_one_member_can_be_drawn(document):
    one = FrontDocument.of(document.study, document.base, [], [document.members[-1]])
    ET.fromstring(front_svg(one))


def test_a_front_of_perfect_members_can_be_drawn(document):
    perfect = replace(
        document.members[-1], quality=replace(document.members[-1].quality, retained=1.0)
    )
    ET.fromstring(front_svg(FrontDocument.of(document.study, document.base, [], [perfect])))


def test_an_empty_front_cannot_be_drawn(document):
    with pytest.raises(NoAnswerError, match=r"cannot be drawn.*--resume and a larger --budget"):
        front_svg(FrontDocument.of(document.study, document.base, [], []))


def test_the_picture_is_written_as_text(document, tmp_path):
    file = write_picture(tmp_path / "front.svg", document)
    assert file.read_text(encoding="utf-8").startswith("<svg ")


def test_names_are_escaped(document):
    hostile = replace(document, study=replace(document.study, model="a/<b>&"))
    assert "&lt;b&gt;&amp;" in front_svg(hostile)


def test_a_scale_maps_its_ends_to_the_ends_of_the_axis():
    linear, log = Scale(0, 4, 100, 300), Scale(1, 100, 0, 200, is_log=True)
    assert (linear(0), linear(1), linear(4)) == (100, 150, 300)
    assert (log(1), log(10), log(100)) == (0, 100, 200)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.77, 1.01, [0.8, 0.85, 0.9, 0.95, 1.0]),
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.985, 1.001, [0.985, 0.99, 0.995, 1.0]),
    ],
)
def test_linear_ticks_are_round_and_few(low, high, ticks):
    assert linear_ticks(low, high) == pytest.approx(ticks)


def test_log_ticks_are_round_and_inside():
    assert log_ticks(9.0, 100.0) == [10, 15, 20, 30, 50, 70, 100]
    wide = log_ticks(0.9, 2000.0)
    assert wide[:4] == [1, 2, 5, 10]
    assert wide[-1] == 2000


def test_the_horizontal_axis_is_the_main_resource(document):
    changed = FrontDocument.of(
        document.study, document.base, document.baselines, document.members,
        objectives=Objectives.parse("quality,latency"),
    )  # fmt: skip
    svg = front_svg(changed)
    ET.fromstring(svg)
    assert "time per token, ms (log scale)" in svg
    assert "ms per token" in svg
    assert "storage, MB (log scale)" in front_svg(document)


def test_a_resource_that_all_models_take_alike_can_still_be_drawn(document):
    changed = FrontDocument.of(
        document.study, document.base, document.baselines, document.members,
        objectives=Objectives.parse("quality,macs"),
    )  # fmt: skip
    ET.fromstring(front_svg(changed))
