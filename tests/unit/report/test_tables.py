from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from autocompress.core import Objectives
from autocompress.fronts import FrontDocument, pick
from autocompress.objectives import Candidate, judge
from autocompress.report import formats
from autocompress.report.tables import (
    evaluation_table,
    front_table,
    gate_table,
    member_table,
    methods_table,
    space_table,
    spaces_table,
    verification_table,
)


def shown(table, width=80):
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert "…" not in stream.getvalue()
    return stream.getvalue()


def test_the_front_fits_80_columns_one_line_per_model(document):
    text = shown(front_table(document))
    for member in document.members:
        line = next(x for x in text.splitlines() if (member.name or member.id[:8]) in x)
        assert formats.size(member.storage_bytes) in line
        assert f"{member.quality.retained:.5f}"[:4] in line
    assert "base" in text
    assert "18 of 60 trials are on the front; hypervolume 0.874" in text


@pytest.mark.parametrize("optimize", ["quality,latency", "quality,bytes,latency"])
def test_the_front_shows_the_resources_that_were_optimized(document, optimize):
    changed = FrontDocument.of(
        document.study, document.base, document.baselines, document.members,
        objectives=Objectives.parse(optimize),
    )  # fmt: skip
    text = shown(front_table(changed))
    assert "ms/token" in text
    for member in changed.members:
        line = next(x for x in text.splitlines() if (member.name or member.id[:8]) in x)
        assert formats.significant(member.latency_ms_per_token) in line
    assert f"At no more {changed.objectives.words}" in " ".join(text.split())


def test_the_front_marks_knee_best_and_beaten_baselines(document):
    lines = shown(front_table(document)).splitlines()
    marks = {mark: next(x for x in lines if mark in x) for mark in ("knee", "best ce", "beaten")}
    assert document.knee.id[:8] in marks["knee"]
    assert "uniform-8bit" in marks["beaten"]


def test_the_front_compares_each_baseline_with_the_best_at_no_more_bytes(document):
    text = shown(front_table(document))
    rows = text[text.index("Δ retained") :].splitlines()
    for compared in document.comparisons:
        line = next(x for x in rows if x.strip().startswith(compared.baseline))
        assert line.rstrip().endswith(compared.label)
    assert f"of {len(document.baselines)} baselines" in " ".join(text.split())
    assert "Δ retained" not in shown(front_table(replace(document, comparisons=())))


@pytest.mark.parametrize("width", [40, 60])
def test_narrow_terminals_wrap_and_lose_nothing(document, width):
    shown(front_table(document), width)
    shown(member_table(document.members[3]), width)


def test_a_member_shows_its_exact_bytes_the_origin_of_costs_and_its_schemes(document):
    member = pick(document, min_quality=0.96)
    text = shown(member_table(member))
    assert member.id in text
    assert f"({member.storage_bytes:,} bytes)" in text
    assert "ms; analytic (roofline of cpu-2core-avx512)" in text
    assert "gptq(bits=4,group_size=64)" in text


def test_a_gate_shows_each_check_with_its_verdict(document):
    candidate = Candidate.of_member(pick(document))
    checks = judge(candidate, min_quality=candidate.retained, max_bytes=1000, max_latency_ms=1e3)
    lines = shown(gate_table(candidate, checks)).splitlines()
    assert any("retained" in x and "pass (within noise)" in x for x in lines)
    assert any("storage bytes" in x and "≤ 1.00 kB" in x and "FAIL" in x for x in lines)
    assert any("latency ms per token" in x and "pass" in x for x in lines)
    assert any("latency ms per token: analytic (roofline of cpu-2core-avx512)" in x for x in lines)


def test_a_gate_says_what_is_not_known():
    candidate = Candidate("x", 0.9, 0.0, 10)
    assert "not known" in shown(gate_table(candidate, judge(candidate, max_latency_ms=1.0)))


def test_a_verification_shows_both_numbers():
    rows = (("retained", 0.97, 0.97, True), ("storage_bytes", 22_100_000, 22_100_001, False))
    lines = shown(verification_table(SimpleNamespace(rows=rows))).splitlines()
    assert any("22,100,000 bytes" in x and "22,100,001 bytes" in x and "FAIL" in x for x in lines)
    assert any("0.970000" in x and "pass" in x for x in lines)


def test_an_evaluation_shows_quality_and_metrics():
    text = shown(
        evaluation_table(
            {
                "model": "smaller", "base": "google/[gemma]", "task": "causal-lm",
                "data": "python-docs", "tokens": 8192, "storage_bytes": 22e6,
                "base_storage_bytes": 88e6, "size_reduction": 4.0,
                "quality": {
                    "retained": 0.97, "standard_error": 0.003,
                    "metrics": {"perplexity": {"value": 23.4, "standard_error": 0.5}},
                },
            }
        )
    )  # fmt: skip
    assert "google/[gemma]" in text
    assert "0.970 ± 0.003" in text
    assert "23.40 ± 0.50" in text


def test_spaces_and_methods_wrap_their_descriptions():
    long = "Bits, sparsity and rank in one space for each layer " * 3
    assert "joint" in shown(spaces_table({"joint": long}))
    row = {"name": "svd_llm", "kind": "factorize", "needs": "hessian", "summary": long}
    assert "factorize" in shown(methods_table([row]))
    text = shown(space_table({"n_layers": 36, "options": {"8bit": 24}, "baselines": []}))
    assert "n layers" in text
    assert "8bit (24)" in text
    assert "none" in text


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        (formats.size, (999,), "999 B"),
        (formats.size, (1000,), "1.00 kB"),
        (formats.size, (999_999_999,), "1.00 GB"),
        (formats.size, (22_100_000,), "22.1 MB"),
        (formats.plus_minus, (0.9712, 0.0031), "0.971 ± 0.003"),
        (formats.plus_minus, (0.9712, 0.0004), "0.9712 ± 0.0004"),
        (formats.plus_minus, (21.53, 0.41), "21.53 ± 0.41"),
        (formats.plus_minus, (1.0, 0.0), "1.000"),
        (formats.plus_minus, (0.5, 1e-9), "0.50000 ± 0.00001"),
        (formats.plus_minus, (float("nan"), 0.1), "–"),
        (formats.plus_minus, (0.5, float("nan")), "0.500"),
        (formats.significant, (0.0001234,), "0.000123"),
        (formats.significant, (0.0,), "0"),
        (formats.significant, (10_616_832.0,), "1.06e+07"),
        (formats.duration, (3.21,), "3.2 s"),
        (formats.duration, (59.99,), "1 min 00 s"),
        (formats.duration, (212.4,), "3 min 32 s"),
        (formats.duration, (7500,), "2 h 05 min"),
        (formats.count, (241_664,), "241,664"),
    ],
)
def test_numbers_read_well(function, arguments, text):
    assert function(*arguments) == text
