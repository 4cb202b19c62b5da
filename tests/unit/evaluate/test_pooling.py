"""Poolings beside a naive reference, in scores, in the curvature pass and in shared prefixes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autocompress.bank import Bank
from autocompress.core import Allocation, Scheme, TrialRequest
from autocompress.core.errors import ModelError
from autocompress.cost import DEFAULT_PROFILE, PROFILES, CostModel
from autocompress.evaluate import TASKS, Split, TaskLoss, curvature_batches
from autocompress.evaluate.pooling import pool
from autocompress.methods import LayerStatistics
from autocompress.models import (
    CurvatureStore,
    collect_curvature,
    describe,
    weight_matrix,
)
from autocompress.search import TrialContext
from autocompress.search.run_trial import run_trial
from autocompress.testing.tiny_models import tiny_model

POOLINGS = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean", "cls+max")
TASK = TASKS["feature-extraction"]


def naive(rows: torch.Tensor, name: str) -> torch.Tensor:
    """The embedding of one text from the hidden states of its tokens, (n, width)."""
    n = len(rows)
    return {
        "mean": sum(rows) / n,
        "cls": rows[0],
        "lasttoken": rows[-1],
        "max": torch.stack([max(column) for column in rows.T]),
        "mean_sqrt_len_tokens": sum(rows) / n**0.5,
        "weightedmean": sum((i + 1) * row for i, row in enumerate(rows)) / (n * (n + 1) / 2),
    }[name]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pooling_is_that_of_each_text_by_itself_wherever_the_padding_is(pooling, side):
    generator = torch.Generator().manual_seed(0)
    hidden, mask = torch.randn(3, 6, 4, generator=generator), torch.zeros(3, 6, dtype=torch.long)
    places = [slice(6 - n, 6) if side == "left" else slice(0, n) for n in (6, 4, 1)]
    for row, place in zip(mask, places, strict=True):
        row[place] = 1
    found = pool(hidden, mask, pooling)
    for text, place, embedding in zip(hidden, places, found, strict=True):
        expected = torch.cat([naive(text[place], name) for name in pooling.split("+")])
        torch.testing.assert_close(embedding, expected / expected.norm())


def test_an_unknown_pooling_is_refused_with_what_there_is():
    with pytest.raises(ModelError, match=r"mean, cls, lasttoken.*says 'SpladePooling'.*Next step"):
        TASK.with_pooling("SpladePooling")
    with pytest.raises(ModelError, match="Did you mean 'lasttoken'"):
        TASK.with_pooling("cls+lastoken")


def test_only_other_poolings_than_the_mean_name_other_caches():
    assert TASK.details == {"pooling": "mean"}
    assert (TASK.facts, TASK.with_pooling("mean").facts) == ((), ())
    facts = {tuple(TASK.with_pooling(name).facts) for name in POOLINGS}
    assert len(facts) == len(POOLINGS)
    assert TASKS["causal-lm"].with_pooling("cls") is TASKS["causal-lm"]


def texts(*lengths: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(5, 320, (n,), generator=generator),
            "pad_token_id": torch.tensor(0),
        }
        for n in lengths
    ]


@pytest.mark.parametrize("family", ["bert-encoder", "llama"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_curvature_pass_weighs_the_tokens_that_the_pooling_reads(tmp_path, family, pooling):
    module, task = _headless(family), TASK.with_pooling(pooling)
    layout, split = describe(module), Split.of("calibration", texts(9, 5, 7))
    store = CurvatureStore(tmp_path)
    batches = curvature_batches(task, module, split)
    collect_curvature(module, layout, batches, TaskLoss(task), store)
    for layer in layout.layers:
        if layer.kind != "embedding":
            statistics = store.statistics(layer)
            assert statistics.hessian is None or bool(statistics.hessian.isfinite().all())
    last = next(layer for layer in reversed(layout.layers) if layer.role == "down")
    energies = store.energies(last)
    read = {"cls": 3, "lasttoken": 3}.get(pooling)
    assert read is None or store.statistics(last).n_tokens == read  # one token of each text
    assert float(energies.sum()) > 0


@pytest.mark.parametrize("family", ["bert-encoder", "llama"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_shared_block_outputs_give_the_same_bits_under_each_pooling(tmp_path, family, pooling):
    module, task = _headless(family), TASK.with_pooling(pooling)
    layout, split = describe(module), Split.of("search", texts(9, 5, 7, 8))
    weights = {layer.name: weight_matrix(module, layer) for layer in layout.layers}
    shared = TrialContext(
        module=module,
        layout=layout,
        bank=Bank(tmp_path, layout, weights, lambda _: LayerStatistics.none()),
        task=task,
        split=split,
        reference=task.reference(module, split, batch_size=2),
        cost=CostModel(
            layout.layers, layout.other_bytes, layout.other_macs_per_token,
            PROFILES[DEFAULT_PROFILE],
        ),
        batch_size=2,
    )  # fmt: skip
    alone = replace(shared, prefix_bytes=0)
    last = [layer.name for layer in layout.layers if layer.block == 1]
    for number, name in enumerate(last):
        allocation = {name: Scheme.parse("rtn(bits=3,group_size=32)")}
        request = TrialRequest(number, Allocation.of(allocation), "test")
        one, other = run_trial(request, context=shared), run_trial(request, context=alone)
        assert one.error == other.error
        assert one.damages == other.damages
        assert one.metrics.quality == other.metrics.quality
    assert shared.prefix.counts.computed < len(last) * 2 * 2  # some blocks were not run again
    assert len(set(one.damages)) > 1


def _headless(family):
    """A model whose output is hidden states."""
    module = tiny_model(family)
    return module if family == "bert-encoder" else module.model
