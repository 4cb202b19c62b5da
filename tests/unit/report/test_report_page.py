from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from example_run import BITS, footprint, make_layers

from autocompress.core import Objectives, Resource
from autocompress.core.errors import RunDirectoryError
from autocompress.fronts import FrontDocument
from autocompress.report.html import (
    environment,
    lede,
    render_report,
    short_model_name,
    tiles,
    write_report,
)
from autocompress.report.layers import block_of, layer_bits, short_names
from autocompress.report.page_data import heat_map, hypervolume_history, page_data, trial_summary

VOID = {"meta", "link", "br", "input", "img", "hr"}


class Page(HTMLParser):
    """Collects ids, loaded addresses, text and the data of a page; checks that tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self._in_data = False
        self.data = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.add(attributes.get("id", ""))
        self.loads += [value for key, value in attrs if key in ("src", "href") and value]
        self._in_data = attributes.get("id") == "data"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._in_data = False

    def handle_data(self, text):
        if self._in_data:
            self.data += text
        elif "script" not in self.open and "style" not in self.open:
            self.text += text


@pytest.fixture(scope="module")
def page(run_of_sixty):
    return Page(render_report(*run_of_sixty))


def test_the_page_loads_nothing_from_elsewhere(page):
    assert page.loads == []
    assert page.open == []
    assert {"front", "heatmap", "progress", "members", "data"} <= page.ids


def test_the_page_shows_every_member_and_every_baseline(page, document):
    text = " ".join(page.text.split())
    for member in document.members:
        assert member.id[:8] in text
    for baseline in document.baselines:
        assert baseline.name in text
    assert "best cost efficiency" in text
    assert "knee" in text


def test_the_page_compares_each_baseline_with_the_best_at_no_more_bytes(document, page):
    section = page.text[page.text.index("Against what needs no search") :]
    for compared in document.comparisons:
        assert compared.baseline in section
        assert compared.label in section
    assert "comparisons" in page.ids


@pytest.mark.parametrize(
    ("chosen_on", "said"),
    [
        (("search", "search"), ["The model that is compared has the least damage on search"]),
        (("report", "report"), ["The best that fits is chosen on the same tokens"]),
        (
            ("report", "search"),
            ["Against u6 the best that fits is chosen", "Every other model that is compared has"],
        ),
    ],
)
def test_the_page_says_which_tokens_chose_what_is_compared(run_of_sixty, chosen_on, said):
    document, trials, provenance = run_of_sixty
    duel = next(c for c in document.comparisons if c.is_duel)
    compared = tuple(
        replace(duel, baseline=name, chosen_on=tokens)
        for name, tokens in zip(("u6", "u4"), chosen_on, strict=True)
    )
    page = Page(render_report(replace(document, comparisons=compared), trials, provenance))
    possible = [
        "The model that is compared has the least damage on search",
        "The best that fits is chosen on the same tokens",
        "Against u6 the best that fits is chosen",
        "Every other model that is compared has",
    ]
    assert [text for text in possible if text in page.text] == said


def test_the_page_of_a_front_that_did_not_compare_has_no_such_section(run_of_sixty):
    document, trials, provenance = run_of_sixty
    old = Page(render_report(replace(document, comparisons=()), trials, provenance))
    assert "comparisons" not in old.ids


def test_the_page_states_provenance_definition_and_failures(page, provenance):
    text = " ".join(page.text.split())
    assert provenance["commit"] in text
    assert provenance["model"]["digest"] in text
    assert "Intel Xeon (Sapphire Rapids)" in text
    assert "Cost efficiency (version 1) is retained3 / resources1 × size reduction1" in text
    assert "worker died" in text
    assert "gptq fell back to rtn on pooler: 96 tokens" in text


def test_text_from_trials_cannot_become_markup(page, run_of_sixty):
    assert "<b>not bold</b>" in page.text  # parsed back from its escaped form
    document, trials, _ = run_of_sixty
    evil = "</script><script>alert(1)</script>"
    hostile = replace(document, study=replace(document.study, model=evil))
    hostile.study.details["layer_bits"].setdefault(evil, {"base": 32.0})
    try:
        text = render_report(hostile, trials, {evil: evil})
    finally:
        del hostile.study.details["layer_bits"][evil]
    assert evil not in text
    assert json.loads(Page(text).data)["heatmap"]["layers"][-1] == evil


def test_the_data_of_the_page_agree_with_the_document(page, document):
    data = json.loads(page.data)
    assert [m["id"] for m in data["members"]] == [m.id for m in document.members]
    assert [m["bytes"] for m in data["members"]] == [m.storage_bytes for m in document.members]
    assert sum(m["knee"] for m in data["members"]) == 1
    assert sum(m["best"] for m in data["members"]) == 1
    assert data["base"]["bytes"] == document.base.storage_bytes
    assert data["floor"] == 0.9


def test_trials_in_grey_are_those_neither_on_the_front_nor_baselines(document, trials):
    shown = page_data(document, trials)["trials"]
    named = {m.id for m in (*document.members, *document.baselines)}
    grey = {t.request.number for t in trials if t.is_complete and len(t.request.allocation)} - {
        t.request.number for t in trials if t.request.allocation.digest in named
    }
    assert {trial["number"] for trial in shown} == grey
    assert grey


def test_the_heat_map_gives_the_bits_of_each_layer_of_each_member(document):
    heat = heat_map(document)
    assert heat["layers"] == [layer.name for layer in make_layers()]
    row = [m.id for m in document.members].index(heat["members"][3])
    for name, scheme, bits in zip(heat["layers"], heat["schemes"][3], heat["bits"][3], strict=True):
        assert scheme == document.members[row].allocation.get(name, "base")
        assert bits == pytest.approx(BITS[scheme], abs=1e-4)
    assert len(heat["starts"]) == 6


def test_without_layer_bits_there_is_no_heat_map(document, trials):
    study = replace(document.study, details={})
    bare = replace(document, study=study)
    assert heat_map(bare) is None
    assert json.loads(Page(render_report(bare, trials, {})).data)["heatmap"] is None


def test_the_hypervolume_of_the_search_never_falls(document, trials):
    history = hypervolume_history(document, list(reversed(trials)))
    assert history["number"] == list(range(60))
    assert history["all"] == sorted(history["all"])
    assert history["all"][-1] >= history["baselines"][-1] > 0
    assert history["all"][:6] == history["baselines"][:6]


def test_trials_are_summed_up_by_status(trials):
    summary = trial_summary(trials)
    assert list(summary["counts"].items()) == [
        ("complete", 57), ("not_finite", 2), ("worker_died", 1),
    ]  # fmt: skip
    assert [t.request.number for t in summary["failed"]] == [23, 37, 41]
    assert [t.request.number for t in summary["notes"]] == [30]


def test_an_empty_front_still_gives_a_page(document, trials):
    empty = FrontDocument.of(document.study, document.base, [], [])
    page = Page(render_report(empty, [t for t in trials if not t.is_complete], {}))
    assert "the front is empty" in page.text
    assert json.loads(page.data)["members"] == []


def test_numbers_that_are_not_known_do_not_break_the_page(document, trials):
    broken = replace(
        document.members[0], cost_efficiency=math.nan, name="broken",
        quality=replace(document.members[0].quality, retained=math.nan),
    )  # fmt: skip
    page = Page(render_report(replace(document, baselines=(broken,)), trials, {}))
    assert json.loads(page.data)["baselines"][0]["efficiency"] is None


def test_the_first_sentence_and_the_key_figures_name_what_came_out(document):
    assert lede(document).startswith(f"{len(document.members)} measured models, from ")
    figures = {tile["label"]: tile for tile in tiles(document)}
    assert set(figures) == {
        "Best cost efficiency", "Knee", "Against uniform-4bit", "Hypervolume",
    }  # fmt: skip
    best = document.most_cost_efficient
    assert figures["Best cost efficiency"]["value"] == f"{best.size_reduction:.1f}× smaller"


def test_a_gain_over_uniform_is_stated_at_no_less_quality(document):
    rival = next(b for b in document.baselines if b.name == "uniform-4bit")
    better = replace(
        document.members[-1], id="f" * 32, name="", storage_bytes=rival.storage_bytes * 3 // 4,
    )  # fmt: skip
    improved = FrontDocument.of(document.study, document.base, document.baselines, [better])
    tile = next(t for t in tiles(improved) if t["label"] == "Against uniform-4bit")
    assert tile["value"] == "25% smaller"


@pytest.mark.parametrize(("gain", "value"), [(0.01, "+0.010 retained"), (0.001, "no gain")])
def test_a_gain_at_no_more_bytes_is_stated_as_quality(document, gain, value):
    rival = next(b for b in document.baselines if b.name == "uniform-4bit")
    quality = replace(rival.quality, retained=rival.quality.retained + gain)
    better = replace(document.members[-1], id="f" * 32, name="", quality=quality)
    better = replace(better, storage_bytes=rival.storage_bytes)
    improved = FrontDocument.of(document.study, document.base, document.baselines, [better])
    tile = next(t for t in tiles(improved) if t["label"] == "Against uniform-4bit")
    assert tile["value"] == value


@pytest.mark.parametrize(
    ("gain", "value"), [(0.003, "+0.003 retained"), (1e-4, "+0.00010 retained")]
)
def test_a_gain_that_is_significant_is_no_gain_too_small_to_state(document, gain, value):
    rival = next(b for b in document.baselines if b.name == "uniform-4bit")
    exact = replace(rival.quality, standard_error=gain / 10)
    sure = replace(rival, quality=exact)
    quality = replace(exact, retained=exact.retained + gain)
    better = replace(rival, id="f" * 32, name="", quality=quality)
    improved = FrontDocument.of(document.study, document.base, [sure], [better])
    tile = next(t for t in tiles(improved) if t["label"] == "Against uniform-4bit")
    assert tile["value"] == value


def test_the_page_is_written_whole_or_not_at_all(run_of_sixty, tmp_path):
    file = write_report(tmp_path, *run_of_sixty)
    assert file == tmp_path / "report.html"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        write_report(tmp_path / "nowhere" / "report.html", *run_of_sixty)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("package:all_minilm_l6_v2/model", "all_minilm_l6_v2"),
        ("google/gemma-3-270m", "gemma-3-270m"),
        ("/models/tiny/", "tiny"),
        ("gpt2", "gpt2"),
        ("/", "/"),
    ],
)
def test_a_model_is_called_by_the_part_that_tells_it_apart(source, name):
    assert short_model_name(source) == name


def test_short_layer_names_keep_what_tells_siblings_apart():
    names = [layer.name for layer in make_layers(2)]
    assert short_names(names)[:7] == [
        "word_embeddings", "0 query", "0 key", "0 value", "0 attention.output.dense",
        "0 intermediate.dense", "0 output.dense",
    ]  # fmt: skip
    assert len(set(short_names(names))) == len(names)
    assert block_of("model.layers.12.mlp.up_proj") == "model.layers.12"
    assert block_of("lm_head") == ""


def test_layer_bits_hold_the_base_and_every_scheme_in_use(document):
    table = layer_bits(make_layers(1), document.members[:1], footprint)
    assert all(bits["base"] == 32.0 for bits in table.values())
    scheme = document.members[0].allocation["encoder.layer.0.output.dense"]
    assert table["encoder.layer.0.output.dense"][scheme] == pytest.approx(BITS[scheme])


def test_templates_refuse_a_name_that_nobody_gave():
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        environment().from_string("{{ nobody }}").render()


def test_a_report_needs_no_torch():
    code = (
        "import sys, autocompress.report.html, autocompress.report.tables, "
        "autocompress.report.progress, autocompress.report.picture; "
        "print([m for m in ('torch', 'transformers', 'ray', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_colour_of_the_page_is_defined_for_light_and_dark():
    source = environment().loader.get_source(environment(), "report_style.html")[0]
    light, dark = source.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"(--[a-z-]+):", light)) - {"--mono"}
    assert names == set(re.findall(r"(--[a-z-]+):", dark))
    assert set(re.findall(r"var\((--[a-z-]+)\)", source)) <= names | {"--mono"}


def over(document, optimize):
    """The same models, as a search over other objectives would have published them."""
    return FrontDocument.of(
        document.study, document.base, document.baselines, document.members,
        objectives=Objectives.parse(optimize),
    )  # fmt: skip


@pytest.mark.parametrize("optimize", ["quality,latency", "quality,macs", "quality,bytes,latency"])
def test_a_page_is_about_what_was_optimized(document, trials, optimize):
    changed = over(document, optimize)
    page = Page(render_report(changed, trials, {}))
    main = changed.objectives.main
    axis = "bytes" if main == "storage_bytes" else main
    assert json.loads(page.data)["optimized"][0] == axis
    assert f"searched, at no more {changed.objectives.words}" in page.text
    assert f"1× base {changed.objectives.words.split(' ')[0]}" in page.text
    assert page.text.count("saves") == len(changed.objectives.resources)
    assert lede(changed).count("from ") == len(changed.objectives.resources)


def test_the_chosen_axis_is_the_main_resource(document):
    def selected(changed):
        return re.findall(r'<option value="(\w+)" selected', render_report(changed, [], {}))

    assert selected(document) == ["bytes"]
    assert selected(over(document, "quality,latency,bytes")) == ["latency_ms_per_token"]


def test_the_headline_names_what_is_saved_of_the_main_resource(document):
    rival = document.baselines[0]
    faster = replace(
        document.members[-1], id="f" * 32, name="", quality=replace(rival.quality, retained=1.1),
        resources={**rival.resources, "latency_ms_per_token": Resource(1e-3, "ms", "analytic")},
    )  # fmt: skip
    changed = FrontDocument.of(
        document.study, document.base, document.baselines, [faster],
        objectives=Objectives.parse("quality,latency"),
    )  # fmt: skip
    (found,) = [t for t in tiles(changed) if t["label"].startswith("Against")]
    assert found["value"] == "100% less latency"
