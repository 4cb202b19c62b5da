"""A trained mixture of experts: what its experts and routers lose, and which published orders hold.

Trains the model of `mixture_model.py`, unless the folder holds one, and measures on documents that
it never saw: bits for all experts; bits by use, by predicted damage and by chance at equal bytes;
routers and attention beside experts; dropped experts, those least used, least by prediction and by
chance, their tokens lost or sent on; merged ones at the same bytes.

Usage: python benchmarks/mixture.py FOLDER [--pooled-balance] [--steps N] [--tokens N] [--seed N]
       [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

import torch
from methods import BATCH, Claim, verdict
from mixture_arms import (
    BITS,
    DROPPED,
    HALF,
    TIERS,
    Arm,
    Mixture,
    Row,
    fewer,
    gptq,
    routers_and_attention,
    rtn,
    widths,
)
from mixture_model import HELD_OUT, N_EXPERTS, PER_TOKEN, train, watched_routers
from scipy.stats import kendalltau

from autocompress.fronts import paired_difference


def mean_row(rows: Sequence[Row]) -> Row:
    """The mean over several draws, sequence by sequence; its error is that between sequences."""
    if len(rows) == 1:
        return rows[0]
    damages = [fmean(parts) for parts in zip(*(row["damages"] for row in rows), strict=True)]
    means = {
        what: {key: fmean(row[what][key] for row in rows) for key in rows[0][what]}
        for what in ("damage", "perplexity")
    }
    draws = [row["damage"]["value"] for row in rows]
    return {**rows[0], **means, "damages": damages, "draws": draws}


CLAIMS = (
    *(
        Claim(f"GPTQ beats rounding in experts at {bits} bits",
              f"experts {gptq(bits)}", f"experts {rtn(bits)}")
        for bits in BITS
    ),
    *(
        claim
        for name in TIERS
        for claim in (
            Claim(f"{name}: bits by use beat chance", f"{name} by use", f"{name} by chance"),
            Claim(f"{name}: bits by use beat the reverse",
                  f"{name} by use", f"{name} by least use"),
            Claim(f"{name}: bits by use beat 3 bits for all",
                  f"{name} by use", f"experts {gptq(3)}"),
        )
    ),
    Claim("bits by predicted damage beat 3 bits for all",
          "bits by predicted damage", f"experts {gptq(3)}"),
    Claim("bits by predicted damage beat quarters by use",
          "bits by predicted damage", "quarters by use"),
    *(
        claim
        for n in DROPPED
        for claim in (
            Claim(f"{n} of 8: dropping the least used beats chance",
                  f"drop {n} least used", f"drop {n} by chance"),
            Claim(f"{n} of 8: predicted damage drops better than use",
                  f"drop {n} least predicted", f"drop {n} least used"),
            Claim(f"{n} of 8: predicted damage drops better than chance",
                  f"drop {n} least predicted", f"drop {n} by chance"),
            Claim(f"{n} of 8: in the mean of all blocks is better than in each block",
                  f"drop {n} least predicted anywhere", f"drop {n} least predicted"),
            Claim(f"{n} of 8: sending tokens on beats losing them",
                  f"drop {n} least used, tokens sent on", f"drop {n} least used"),
            Claim(f"{n} of 8: anywhere, sending tokens on beats losing them",
                  f"drop {n} least predicted anywhere, tokens sent on",
                  f"drop {n} least predicted anywhere"),
            Claim(f"{n} of 8: merging beats dropping the least used",
                  f"merge {n} pairs to the mean", f"drop {n} least used"),
            Claim(f"{n} of 8: merging beats dropping anywhere and sending tokens on",
                  f"merge {n} pairs to the mean",
                  f"drop {n} least predicted anywhere, tokens sent on"),
            Claim(f"{n} of 8: the weighted mean beats the busiest",
                  f"merge {n} pairs to the mean", f"merge {n} pairs to the busiest"),
        )
    ),
    Claim("fewer bits beat fewer experts at equal bytes", f"experts {gptq(4)}", HALF),
)  # fmt: skip
"""Kim et al. 2023 (MoQE), Li et al. 2024 (QuantMoE-Bench), Lu et al. 2024, MC-SMoE, REAP."""

PER_BYTE = (
    Claim("experts damage less per byte saved than attention at 4 bits",
          f"experts {gptq(4)}", f"attention {gptq(4)}"),
    Claim("experts damage less per byte saved than routers at 4 bits",
          f"experts {gptq(4)}", f"routers {rtn(4)}"),
)  # fmt: skip


def per_byte(row: Row) -> Row:
    """Damages over the megabytes that they save."""
    share = 1e6 / row["bytes_saved"]
    damage = {key: share * value for key, value in row["damage"].items()}
    return {**row, "damage": damage, "damages": [share * value for value in row["damages"]]}


def decided(claim: Claim, rows: dict[str, Row]) -> Row | None:
    """As `verdict`; beside chance the error counts how far draws lie apart."""
    found = verdict(claim, rows)
    if found is None or "draws" not in rows[claim.worse]:
        return found
    worse = rows[claim.worse]
    difference = paired_difference(rows[claim.better]["damages"], worse["damages"])
    draws = [draw / worse["damage"]["value"] * fmean(worse["damages"]) for draw in worse["draws"]]
    error = math.hypot(difference.standard_error, stdev(draws) / math.sqrt(len(draws)))
    deviations = round(difference.value / error, 2) if error else None
    answer = found["answer"] if abs(difference.value) > 2 * error else "not decided"
    return {**found, "answer": answer, "difference_in_standard_errors": deviations}


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """Of all claims."""
    known = {row["scheme"]: row for row in rows}
    shares = {name: per_byte(row) for name, row in known.items() if row["bytes_saved"] > 0}
    found = [decided(claim, known) for claim in CLAIMS]
    found += [verdict(claim, shares) for claim in PER_BYTE]
    return [answer for answer in found if answer is not None]


def specialisation(mixture: Mixture) -> list[Row]:
    """By block: how evenly tokens are spread over experts, and how surely each is sent."""
    found = []
    with watched_routers(mixture.module) as probabilities:
        for batch in mixture.session.task.batches(mixture.session.splits.search, BATCH):
            with torch.no_grad():
                mixture.module(**batch)
    for block, rows in probabilities.items():
        chance = torch.cat(rows)
        token = -(chance * chance.clamp_min(1e-30).log()).sum(1).mean()
        sent = torch.tensor([mixture.sent[block, e] for e in range(N_EXPERTS)]).double()
        share = sent / sent.sum()
        spread = -(share * share.clamp_min(1e-30).log()).sum()
        found.append({
            "block": block, "shares": [round(float(s), 4) for s in share],
            "entropy_of_use": round(float(spread) / math.log(N_EXPERTS), 4),
            "entropy_of_a_token": round(float(token) / math.log(N_EXPERTS), 4),
        })  # fmt: skip
    return found


def ranking(mixture: Mixture) -> Row:
    """How use and predicted damage rank experts by what dropping each alone damages."""
    rows = []
    for expert in mixture.layers:
        arm = Arm("one", mixture.allocation({expert: "drop"}))
        rows.append({
            "block": expert[0], "expert": expert[1], "tokens": mixture.sent[expert],
            "predicted": mixture.predicted_to_drop(expert),
            "damage": mixture.row(arm)["damage"]["value"],
        })  # fmt: skip
    damages = [row["damage"] for row in rows]
    return {
        "kendall_tau_of_use": round(_tau([row["tokens"] for row in rows], damages), 4),
        "kendall_tau_of_prediction": round(_tau([row["predicted"] for row in rows], damages), 4),
        "experts": rows,
    }


def _tau(one: Sequence[float], other: Sequence[float]) -> float:
    return float(kendalltau(one, other).statistic)


def unigram_perplexity(mixture: Mixture) -> float:
    """Of the measured tokens by their own frequencies."""
    ids = torch.cat([example["input_ids"] for example in mixture.session.splits.search.examples])
    share = torch.bincount(ids).double() / len(ids)
    return math.exp(float(-(share * share.clamp_min(1e-30).log()).sum()))


def document(mixture: Mixture, training: Row, rows: Sequence[Row]) -> Row:
    """What the JSON holds."""
    session = mixture.session
    return {
        "training": training,
        "experts": N_EXPERTS, "experts_per_token": PER_TOKEN,
        "held_out_documents": f"every {HELD_OUT}th",
        "calibration_tokens": session.splits.calibration.n_tokens,
        "search_tokens": session.splits.search.n_tokens,
        "seed": session.settings.seed,
        "bytes": session.base.layout.base_bytes,
        "unigram_perplexity": round(unigram_perplexity(mixture), 3),
        "routing": specialisation(mixture),
        "alone": ranking(mixture),
        "claims": verdicts(rows),
        "rows": list(rows),
    }  # fmt: skip


def measured(mixture: Mixture) -> Iterator[Row]:
    """All rows, the base model first."""
    yield mixture.row(Arm("base"))
    for arms in chain(widths(mixture), routers_and_attention(mixture), fewer(mixture)):
        yield mean_row([mixture.row(arm) for arm in arms])


def main() -> None:
    """Train if there is no model yet, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the model, its text and the bank")
    parser.add_argument(
        "--pooled-balance", action="store_true", help="train as transformers balances experts"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--tokens", type=int, default=32768, help="to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/methods/mixture.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    record = given.folder / "training.json"
    if not record.exists():
        facts = train(given.folder / "model", given.steps, given.seed, given.pooled_balance)
        record.write_text(json.dumps(facts), encoding="utf-8")
    mixture = Mixture(given.folder, given.tokens, given.seed)
    rows = []
    for row in measured(mixture):
        rows.append(row)
        damage, perplexity = row["damage"]["value"], row["perplexity"]["value"]
        print(f"{row['scheme']:60}{row['bits']:7.3f}{damage:9.4f}{perplexity:9.3f}", flush=True)
    found = document(mixture, json.loads(record.read_text("utf-8")), rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for answer in found["claims"]:
        print(f"{answer['answer']:12} {answer['damage_ratio']:8.3f} {answer['claim']}")


if __name__ == "__main__":
    main()
