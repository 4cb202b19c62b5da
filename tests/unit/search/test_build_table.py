import logging
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from autocompress.bank import Bank
from autocompress.core import Scheme, derived_seed
from autocompress.cost import PROFILES, CostModel
from autocompress.models import (
    CurvatureStore,
    LayerCurvature,
    collect_curvature,
    describe,
    predicted_damage,
    weight_matrix,
)
from autocompress.models.slopes import Slopes
from autocompress.search import build_table
from autocompress.search.build_table import (
    MOST_EXACT,
    NOT_FINITE,
    build_option_table,
    schemes_to_compress,
)
from autocompress.search.probe import Probe
from autocompress.spaces import load_space
from autocompress.testing.tiny_models import tiny_batches, tiny_model


def loss(module, batch, generator):
    logits = module(**batch).logits
    return (logits * torch.randn(logits.shape, generator=generator)).sum(), logits.shape[0]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("table")
    module = tiny_model("llama")
    layout, store = describe(module), CurvatureStore(root / "curvature")
    collect_curvature(module, layout, tiny_batches("llama", n_batches=4), loss, store)
    space = load_space("mixed_precision", layout.layers)
    weights = {layer.name: weight_matrix(module, layer) for layer in layout.layers}
    cost = CostModel(
        layout.layers,
        layout.other_bytes,
        layout.other_macs_per_token,
        PROFILES["cpu-2core-avx512"],
        searched_layers=space.searched_layers,
    )
    bank = Bank(root / "bank", layout, weights, store.statistics)
    return {
        "space": space, "layout": layout, "bank": bank,
        "curvature": store.get, "cost": cost, "weights": weights,
    }  # fmt: skip


def test_totals_are_those_of_the_cost_model(parts):
    table, space = build_option_table(**parts), parts["space"]
    rng = np.random.default_rng(0)
    for _ in range(5):
        levels = [int(rng.integers(len(choice.options))) for choice in space.choices]
        named = {c.name: level for c, level in zip(space.choices, levels, strict=True)}
        resources = parts["cost"].resources(space.decode(named))
        for name in ("storage_bytes", "macs_per_token"):
            assert table.total(name, levels) == resources[name].value
        for name in ("bytes_moved_per_token", "latency_ms_per_token"):
            assert table.total(name, levels) == pytest.approx(resources[name].value, rel=1e-12)


def test_damages_are_zero_for_the_base_and_fall_with_the_bits(parts):
    table = build_option_table(**parts)
    for labels, damage in zip(table.labels, table.damage, strict=True):
        assert (damage >= 0).all()
        assert damage[labels.index("base")] == 0 if "base" in labels else True
        assert damage[0] > damage[-2] > 0


def test_a_dropped_part_damages_by_what_leaves_it_alone(parts, tmp_path):
    """What its other layers put out meets zeros."""
    for tied in (True, False):
        path = tmp_path / "parts.yaml"
        path.write_text(
            "schema_version: 1\nname: parts\ndescription: A test.\n"
            f"ties: {{sublayers: {str(tied).lower()}}}\nchoices:\n"
            "  - roles: [query, key, value, output, gate, up, down]\n"
            "    options: [base, rtn(bits=4), drop]\n"
        )
        space = load_space(str(path), parts["layout"].layers)
        table = build_option_table(**{**parts, "space": space})
        found = {
            c.name: dict(zip(labels, damage, strict=True))
            for c, labels, damage in zip(space.choices, table.labels, table.damage, strict=True)
        }
        if tied:
            joined = found
    for name, damage in joined.items():
        prefix, _, members = name.partition("{")
        alone = [found[n] for n in found if n.startswith(prefix)]
        last = found[prefix + members.rstrip("}").split(",")[-1]]
        assert damage["drop"] == last["drop"] > 0
        assert damage["rtn(bits=4)"] == pytest.approx(sum(d["rtn(bits=4)"] for d in alone))


def test_outputs_that_nobody_reads_damage_nothing(parts, tmp_path):
    """All that a narrower part loses, its reader says."""
    path = tmp_path / "narrow.yaml"
    path.write_text(
        "schema_version: 1\nname: narrow\ndescription: A test.\nties: {sublayers: true}\n"
        "choices:\n  - roles: [gate, up, down]\n"
        "    options: [base, {width: [{method: ziplm, keep_ratio: 0.5}]}]\n"
    )
    space = load_space(str(path), parts["layout"].layers)
    table = build_option_table(**{**parts, "space": space})
    for choice, damage in zip(space.choices, table.damage, strict=True):
        narrow = next(o for o in choice.options if o.label != "base")
        name, scheme = choice.layers[-1], narrow.schemes[-1]
        curvature = parts["curvature"](parts["layout"].layer(name))
        dense = parts["bank"].packed(name, scheme).to_dense()
        expected = predicted_damage(parts["weights"][name], dense, curvature)
        assert damage[0] == pytest.approx(expected, rel=1e-6)
        assert expected > 0


def test_a_kept_table_is_read_again_and_a_damaged_one_built_again(parts, tmp_path, caplog):
    calls = []
    first = build_option_table(**parts, cache=tmp_path, progress=lambda *d: calls.append(d))
    assert calls[-1] == (len(calls), len(calls))
    calls.clear()
    again = build_option_table(**parts, cache=tmp_path, progress=lambda *d: calls.append(d))
    assert again.digest == first.digest
    assert calls == []
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text()[:50])
    with caplog.at_level(logging.WARNING):
        assert build_option_table(**parts, cache=tmp_path).digest == first.digest
    assert path.name in caplog.text
    dearer = replace(parts["cost"], tokens_per_pass=7)
    build_option_table(**{**parts, "cost": dearer}, cache=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_an_option_that_is_not_finite_is_named_and_counts_as_huge(parts, caplog):
    def broken(layer):
        found = parts["curvature"](layer)
        rows = None if found.rows is None else torch.full_like(found.rows, torch.nan)
        return LayerCurvature(rows, found.hessian, found.lookup, "broken")

    table = build_option_table(**{**parts, "curvature": broken})
    assert max(float(d.max()) for d in table.damage) == NOT_FINITE
    assert "is not finite; it counts as 1e+06" in caplog.text


CROSSED = """
schema_version: 1
name: crossed
description: Every combination of rank, sparsity and width.
choices:
  - roles: [query, key, value, qkv, output, gate, up, gate_up, down]
    options:
      - factorize: [none, {method: svd_llm, parameter_ratio: [0.5, 0.75]}]
        sparsify: [none, {method: wanda, sparsity: 0.5}]
        quantize: [none, {method: gptq, bits: [3, 4, 6, 8], group_size: 64}]
"""


@pytest.fixture
def crossed(parts, tmp_path):
    (tmp_path / "crossed.yaml").write_text(CROSSED)
    return load_space(str(tmp_path / "crossed.yaml"), parts["layout"].layers)


def test_of_many_options_a_scheme_counts_as_the_sum_of_its_stages(parts, crossed):
    composed = build_option_table(**parts | {"space": crossed})
    choice = next(i for i, c in enumerate(crossed.choices) if len(c.options) > MOST_EXACT)
    damage = dict(zip(composed.labels[choice], composed.damage[choice], strict=True))
    single = [label for label in damage if "+" not in label]
    both = [label for label in damage if label.count("+") == 1]
    assert both
    for label in both:
        stages = [part for part in single if part in label]
        assert len(stages) == 2
        assert damage[label] == pytest.approx(sum(damage[stage] for stage in stages))


def test_sums_of_stages_rank_options_nearly_as_compressing_them_does(parts, crossed, monkeypatch):
    rich = next(choice for choice in crossed.choices if len(choice.options) > MOST_EXACT)
    one = replace(crossed, choices=(rich,))
    composed = build_option_table(**parts | {"space": one})
    monkeypatch.setattr(build_table, "MOST_EXACT", 1000)
    exact = build_option_table(**parts | {"space": one})
    assert not np.array_equal(composed.damage[0], exact.damage[0])
    tau = kendalltau(composed.damage[0], exact.damage[0]).statistic
    assert tau > 0.75


class Recording(Bank):
    """Remembers what it is asked for."""

    def _start_empty(self):
        super()._start_empty()
        self.asked = []

    def packed(self, name, scheme):
        self.asked.append((name, scheme))
        return super().packed(name, scheme)


@pytest.fixture
def recording(parts, tmp_path):
    layout, weights, store = parts["layout"], parts["weights"], parts["bank"]._statistics
    return Recording(tmp_path / "bank", layout, weights, store)


@pytest.mark.parametrize("name", ["mixed_precision", "joint"])
def test_what_is_filled_is_what_the_damages_ask_for(parts, recording, name):
    space = load_space(name, parts["layout"].layers)
    table = build_option_table(**parts | {"space": space, "bank": recording})
    wanted = schemes_to_compress(space, parts["layout"])
    assert sorted(recording.asked, key=str) == sorted(
        ((name, scheme) for name, schemes in wanted.items() for scheme in schemes), key=str
    )
    assert not any(scheme.is_base for _, scheme in recording.asked)
    sizes = [parts["weights"][name].numel() for name in wanted]
    assert sizes == sorted(sizes, reverse=True)
    filled = build_option_table(
        **parts | {"space": space, "bank": recording}, fill=recording.fill_by_layer
    )
    assert filled.digest == table.digest


def test_layers_may_be_filled_in_any_order_or_not_at_all(parts):
    expected = build_option_table(**parts)
    closed = []

    def backwards(wanted):
        try:
            yield from [*reversed(wanted)][:3]
        finally:
            closed.append(True)

    calls = []
    table = build_option_table(**parts, fill=backwards, progress=lambda *d: calls.append(d))
    assert table.digest == expected.digest
    assert calls == [(i + 1, len(calls)) for i in range(len(calls))]
    assert closed == [True]


def test_an_interrupt_closes_the_filling(parts):
    closed = []

    def filling(wanted):
        try:
            yield from wanted
        finally:
            closed.append(True)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_option_table(**parts, fill=filling, progress=interrupt)
    assert closed == [True]


def test_a_kept_table_needs_no_filling(parts, tmp_path):
    first = build_option_table(**parts, cache=tmp_path)
    again = build_option_table(**parts, cache=tmp_path, fill=pytest.fail)
    assert again.digest == first.digest


@dataclass
class RecordingProbe:
    """Slopes of the layers' errors along one fixed direction for each sample."""

    n_samples: int = 5
    asked: list = field(default_factory=list)

    def measure(self, n_errors, errors):
        self.asked.append(dict(n_errors))
        found = {}
        for name, n in n_errors.items():
            flat = torch.stack(list(errors(name))).flatten(1).double()
            assert flat.shape[0] == n
            found[name] = self.directions(name, flat.shape[1]) @ flat.T
        return Slopes(found, self.n_samples)

    def directions(self, name, width):
        generator = torch.Generator().manual_seed(derived_seed("directions", name))
        return torch.randn(self.n_samples, width, dtype=torch.float64, generator=generator)

    def probe(self, key="one"):
        return Probe(self.measure, key)


def along(parts, probe, name, scheme):
    weight = parts["weights"][name]
    error = parts["bank"].packed(name, scheme).to_dense().double() - weight.double()
    return (probe.directions(name, error.numel()) @ error.flatten()).numpy()


def no_shrinking(predicted, slopes, n_units, groups):
    return 0.5 * (slopes**2).sum(0) / n_units


def test_slopes_of_layers_that_choose_together_add_up(parts, monkeypatch):
    monkeypatch.setattr(build_table, "corrected", no_shrinking)
    recording, space = RecordingProbe(), parts["space"]
    table = build_option_table(**parts, probe=recording.probe())
    for choice, damage in zip(space.choices, table.damage, strict=True):
        for level, option in enumerate(choice.options):
            slopes = sum(
                along(parts, recording, name, scheme)
                for name, scheme in zip(choice.layers, option.schemes, strict=True)
                if not scheme.is_base
            )
            assert damage[level] == pytest.approx(0.5 * np.mean(slopes**2), rel=1e-4)
    assert any(len(choice.layers) > 1 for choice in space.choices)


def test_slopes_of_composed_stages_add_up(parts, monkeypatch, tmp_path):
    monkeypatch.setattr(build_table, "corrected", no_shrinking)
    monkeypatch.setattr(build_table, "MOST_EXACT", 2)
    path = tmp_path / "stages.yaml"
    path.write_text(
        "schema_version: 1\nname: stages\ndescription: A test.\nchoices:\n  - roles: [down]\n"
        "    options: [base, magnitude(sparsity=0.5), magnitude(sparsity=0.5)+rtn(bits=4)]\n"
    )
    space = load_space(str(path), parts["layout"].layers)
    recording = RecordingProbe()
    table = build_option_table(**parts | {"space": space}, probe=recording.probe())
    name = space.choices[0].layers[0]
    pruned, rounded = (Scheme.parse(s) for s in ("magnitude(sparsity=0.5)", "rtn(bits=4)"))
    slopes = along(parts, recording, name, pruned) + along(parts, recording, name, rounded)
    label = next(i for i, text in enumerate(table.labels[0]) if "+" in text)
    assert table.damage[0][label] == pytest.approx(0.5 * np.mean(slopes**2), rel=1e-4)


def test_a_probe_leaves_the_base_at_zero_and_is_part_of_the_key(parts, tmp_path):
    recording = RecordingProbe()
    probed = build_option_table(**parts, probe=recording.probe(), cache=tmp_path)
    plain = build_option_table(**parts, cache=tmp_path)
    assert probed.digest != plain.digest
    for labels, damage in zip(probed.labels, probed.damage, strict=True):
        assert (damage[: labels.index("base")] > 0).all() if "base" in labels else True
        assert damage[labels.index("base")] == 0 if "base" in labels else True
    again = build_option_table(**parts, probe=recording.probe(), cache=tmp_path)
    assert again.digest == probed.digest
    assert len(recording.asked) == 1
    build_option_table(**parts, probe=recording.probe(key="two"), cache=tmp_path)
    assert len(recording.asked) == 2


def test_a_probe_that_does_not_work_out_leaves_the_predictions_and_no_file(parts, tmp_path):
    plain = build_option_table(**parts)
    failing = Probe(lambda *_: None, "one")
    assert build_option_table(**parts, probe=failing, cache=tmp_path).digest == plain.digest
    assert not list(tmp_path.iterdir())
    recording = RecordingProbe()
    build_option_table(**parts, probe=recording.probe(), cache=tmp_path)
    assert len(recording.asked) == 1
