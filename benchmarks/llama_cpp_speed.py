"""One compressed causal model in llama.cpp and here: tokens per second, bytes, perplexity.

    python benchmarks/llama_cpp_speed.py MODEL --client PYTHON --out results/deploy/llama_cpp_M.json

Every layer has one scheme. Contenders take turns on the same number of threads: the base model in
torch, the packed checkpoint on its fastest kernels, and the GGUF file of the same codes in
llama.cpp, which `--client`, a Python that has llama-cpp-python, runs in a process of its own. The
median of the rounds counts. A prefill gives the logits of its last token; decode is a token at a
time, of one text. Perplexity is that of the same tokens of `python-docs` everywhere: here with
decoded weights, as a search measures it, and in llama.cpp, which rounds activations too. For a busy
machine there is ``--busy``: one thread, by the clock of each process, which stops while others run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress import load
from autocompress.core import Scheme
from autocompress.core.machine import cpu_model
from autocompress.evaluate.builtin_data import python_docs
from autocompress.export.formats import EXPORTERS
from autocompress.methods import LayerStatistics, compress
from autocompress.models import load_base_model, weight_matrix

SCHEMES = ("rtn(bits=4,group_size=128)", "rtn(bits=8,group_size=128)")
_CLIENT = """
import json, sys, time
import numpy as np
from llama_cpp import Llama
path, threads, context, every = sys.argv[1], *map(int, sys.argv[2:5])
clock = getattr(time, sys.argv[5])
model = Llama(
    model_path=path, n_ctx=context, n_batch=context, n_ubatch=context, n_threads=threads,
    n_threads_batch=threads, logits_all=bool(every), verbose=False,
)
for line in sys.stdin:
    ids, steps = json.loads(line)
    model.reset()
    seconds = []
    for part in (ids, *([step] for step in steps)):
        start = clock()
        model.eval(part)
        seconds.append(clock() - start)
    nll = None
    if every:
        logits = np.asarray(model.scores[: len(ids) - 1], dtype=np.float64)
        top = logits.max(1)
        sums = np.log(np.exp(logits - top[:, None]).sum(1)) + top
        nll = float((sums - logits[np.arange(len(sums)), ids[1:]]).mean())
    print(json.dumps([seconds, nll]), flush=True)
"""
Turn = Callable[[list[int], list[int]], list[float]]
"""Seconds of a prefill of some tokens that starts anew, and of each step after it."""


class Client:
    """A process that runs a GGUF file."""

    def __init__(self, options: argparse.Namespace, path: Path, context: int, every: bool) -> None:
        about = (options.threads, context, int(every), options.clock)
        arguments = [options.client, "-c", _CLIENT, str(path), *map(str, about)]
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, ids: Sequence[int], steps: Sequence[int]) -> tuple[list[float], float | None]:
        """Seconds of the prefill and of each step; nats per token if it keeps all logits."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([ids, steps]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp ended; its messages are above.")
        seconds, nll = json.loads(line)
        return seconds, nll

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Run from the command line."""
    options = _options()
    torch.set_num_threads(options.threads)
    base = load_base_model(str(options.model), "AutoModelForCausalLM", dtype="float32")
    text = "\n".join(python_docs().texts or ())
    tokenizer = cast(Any, base.processor)
    ids = tokenizer(text, truncation=True, max_length=options.tokens)["input_ids"]
    prompt, steps = ids[: options.prompt], ids[: options.steps]
    rows: dict[str, dict[str, Any]] = {
        "torch float32": {"bytes": base.layout.base_bytes, "nats_per_token": nats(base.module, ids)}
    }
    turns: dict[str, Turn] = {"torch float32": torch_turn(base.module, options.clock)}
    context = 8 + max(len(ids), options.prompt + options.steps)
    with tempfile.TemporaryDirectory() as folder:
        clients = []
        for number, scheme in enumerate(options.schemes):
            weights = {
                layer.name: compress(
                    weight_matrix(base.module, layer), Scheme.parse(scheme), LayerStatistics.none()
                )
                for layer in base.layout.layers
            }
            for name, label in (("packed", f"packed {scheme}"), ("gguf", f"llama.cpp {scheme}")):
                path = Path(folder) / f"{number}-{name}"
                manifest = EXPORTERS[name].write(base, weights, path, claim={})
                rows[label] = {"bytes": manifest.storage_bytes}
                if name == "packed":
                    rows[label]["nats_per_token"] = nats(load(path, dtype="float32"), ids)
                    turns[label] = torch_turn(
                        load(path, dtype="float32", kernels="auto"), options.clock
                    )
                    continue
                file = path / "model.gguf"
                with Client(options, file, context, every=True) as client:
                    rows[label]["nats_per_token"] = client.ask(ids, [])[1]
                clients.append(Client(options, file, context, every=False))
                turns[label] = client_turn(clients[-1])
        for label, seconds in race(turns, prompt, steps, options.rounds).items():
            rows[label] |= seconds
        for client in clients:
            client.__exit__()
    write(options, rows)


def torch_turn(module: nn.Module, clock_name: str) -> Turn:
    """Turns of a torch model."""
    clock = getattr(time, clock_name)

    def run(ids: list[int], steps: list[int]) -> list[float]:
        cache, seconds = None, []
        for part in (ids, *([step] for step in steps)):
            start = clock()
            with torch.no_grad():
                found = module(
                    torch.tensor([part]), past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            cache = found.past_key_values
            seconds.append(clock() - start)
        return seconds

    return run


def client_turn(client: Client) -> Turn:
    """Turns of a GGUF file."""
    return lambda ids, steps: client.ask(ids, steps)[0]


def race(
    turns: dict[str, Turn], prompt: list[int], steps: list[int], rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens per second by contender, from median seconds; the first round is not counted."""
    prefills: dict[str, list[float]] = {name: [] for name in turns}
    decodes: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            prefill, *rest = turn(prompt, steps)
            if number:
                prefills[name].append(prefill)
                decodes[name] += rest
    return {
        name: {
            "prefill_tokens_per_second": len(prompt) / statistics.median(prefills[name]),
            "decode_tokens_per_second": 1 / statistics.median(decodes[name]),
        }
        for name in turns
    }


def nats(module: nn.Module, ids: list[int]) -> float:
    """Mean negative log-likelihood of each token but the first, in float64."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits: Tensor = module(tokens).logits[0, :-1].double()
    return float(functional.cross_entropy(logits, tokens[0, 1:]))


def write(options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Ratios, the JSON and a table."""
    reference = rows["torch float32"]
    for row in rows.values():
        row["perplexity"] = math.exp(row["nats_per_token"])
        for what in ("prefill", "decode"):
            key = f"{what}_tokens_per_second"
            row[f"{what}_over_torch"] = row[key] / reference[key]
    document = {
        "model": options.model.name,
        "threads": options.threads,
        "clock": options.clock,
        "prompt_tokens": options.prompt,
        "steps": options.steps,
        "rounds": options.rounds,
        "perplexity_tokens": options.tokens,
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "cpu": cpu_model(),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    for label, row in rows.items():
        print(
            f"{label:40} {row['bytes'] / 1e6:8.1f} MB  ppl {row['perplexity']:.3f}  "
            f"prefill {row['prefill_over_torch']:5.2f}x  decode {row['decode_over_torch']:5.2f}x"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--client", default=sys.executable, help="a Python with llama-cpp-python")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of the perplexity")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    options = parser.parse_args()
    options.threads = 1 if options.busy else options.threads
    options.clock = "process_time" if options.busy else "perf_counter"
    return options


if __name__ == "__main__":
    main()
