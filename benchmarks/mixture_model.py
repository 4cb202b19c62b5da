"""A small mixture of experts that is trained here: routers that prefer, experts that differ.

Random experts say nothing about which of them matter. This one reads Python's documentation and the
sources of its standard library, both part of every Python; every tenth document is held out.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
import transformers as hf
from torch import Tensor, nn

from autocompress.core import Scheme, derived_seed
from autocompress.evaluate.builtin_data import python_docs
from autocompress.methods import LayerStatistics, compress
from autocompress.models.experts import SeparateExperts
from autocompress.testing.tiny_models import BOS, EOS, PAD, tiny_tokenizer

VOCABULARY = 1024
LENGTH = 128
N_EXPERTS, PER_TOKEN = 8, 2
HELD_OUT = 10  # one document of so many
PIECE = 2000  # characters of an example
_BATCH = 16
_WARM_UP = 50
_RATE = 3e-3
_BALANCE = 0.01


@dataclass(frozen=True)
class Texts:
    """Documents to train on and others."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def texts() -> Texts:
    """The documentation and the standard library's top-level modules, cut by document."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = (path.read_text("utf-8", errors="replace") for path in sorted(library.glob("*.py")))
    documents = [*python_docs().texts, *sources]
    apart = [index % HELD_OUT == HELD_OUT - 1 for index in range(len(documents))]
    pairs = list(zip(documents, apart, strict=True))
    return Texts(tuple(d for d, out in pairs if not out), tuple(d for d, out in pairs if out))


def write_held_out(path: Path) -> Path:
    """The held-out documents in pieces, as JSON Lines."""
    pieces = [
        document[start : start + PIECE]
        for document in texts().held_out
        for start in range(0, len(document), PIECE)
    ]
    lines = [json.dumps({"text": piece}) for piece in pieces]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def untrained(seed: int, pooled: bool = False) -> nn.Module:
    """Four blocks of eight experts, two of them per token; 3.6 million parameters.

    Args:
        seed: of the weights.
        pooled: trained with the balance of transformers, over all blocks together.
    """
    config = hf.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        num_local_experts=N_EXPERTS, num_experts_per_tok=PER_TOKEN, output_router_logits=True,
        router_aux_loss_coef=_BALANCE if pooled else 0.0,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed("mixture", seed))
        return cast(nn.Module, hf.MixtralForCausalLM(config))


def train(folder: Path, steps: int, seed: int, pooled: bool) -> dict[str, Any]:
    """Train and save the model with its tokenizer; what became of it.

    Args:
        folder: to write into.
        steps: of 16 x 128 tokens.
        seed: of weights and order.
        pooled: experts are used evenly over all blocks together, not in each.
    """
    tokenizer = tiny_tokenizer("mixtral", VOCABULARY)
    tokens = _encoded(tokenizer, texts().train)
    model = untrained(seed, pooled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    model.train()
    losses = []
    for step, ids in enumerate(_batches(tokens, steps, seed)):
        found = model(input_ids=ids, labels=ids)
        extra = 0.0 if pooled else _BALANCE * sum(map(imbalance, found.router_logits))
        optimizer.zero_grad()
        (found.loss + extra).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        balance = _BALANCE * found.aux_loss.detach() if pooled else 0.0
        losses.append(float(found.loss.detach() - balance))
        if step % 50 == 49:
            print(f"step {step + 1}: {fmean(losses[-50:]):.3f}", flush=True)
    model.eval()
    cast(Any, model).config.output_router_logits = False  # its loss is of training alone
    cast(Any, model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loss = round(fmean(losses[-50:]), 4)
    return {
        "steps": steps, "training_loss": loss, "seed": seed,
        "balance": "over all blocks" if pooled else "of each block",
    }  # fmt: skip


def imbalance(logits: Tensor) -> Tensor:
    """How unevenly one router spreads the tokens, at least about 1.

    Fedus et al. 2022 (Switch Transformers, arXiv 2101.03961), equation 4. That of transformers
    pools all blocks, so that a block may leave experts without any token.

    Args:
        logits: (tokens, experts).
    """
    chance = logits.softmax(-1)
    sent = torch.zeros_like(chance).scatter_(1, chance.topk(PER_TOKEN).indices, 1 / PER_TOKEN)
    return logits.shape[1] * (sent.mean(0) * chance.mean(0)).sum()


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a line to a hundredth."""
    return min(1.0, (step + 1) / _WARM_UP) * max(0.01, 1 - step / steps)


def _encoded(tokenizer: hf.PreTrainedTokenizerFast, documents: tuple[str, ...]) -> Tensor:
    return torch.tensor([i for document in documents for i in tokenizer(document)["input_ids"]])


def _batches(tokens: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(derived_seed("mixture batches", seed))
    for _ in range(steps):
        starts = torch.randint(len(tokens) - LENGTH, (_BATCH, 1), generator=generator)
        yield tokens[starts + torch.arange(LENGTH)]


def routers_of(module: nn.Module) -> dict[int, nn.Module]:
    """The router of each block."""
    names = [n for n, child in module.named_modules() if isinstance(child, SeparateExperts)]
    routers = [module.get_submodule(f"{name.rpartition('.')[0]}.gate") for name in names]
    return dict(enumerate(routers))


def router_savings(module: nn.Module, scheme: Scheme) -> int:
    """Bytes that a scheme without statistics takes off all routers."""
    weights = [cast(nn.Parameter, router.weight) for router in routers_of(module).values()]
    packed = [compress(weight.detach(), scheme, LayerStatistics.none()) for weight in weights]
    left = sum(tensor.nbytes for one in packed for tensor in one.tensors.values())
    return sum(weight.nbytes for weight in weights) - left


@contextmanager
def rounded_routers(module: nn.Module, scheme: Scheme) -> Iterator[None]:
    """Within the block routers are compressed by a scheme that needs no statistics."""
    before = {router: cast(nn.Parameter, router.weight) for router in routers_of(module).values()}
    try:
        for router, weight in before.items():
            rounded = compress(weight.detach(), scheme, LayerStatistics.none()).to_dense()
            router.weight = nn.Parameter(rounded.to(weight.dtype), requires_grad=False)
        yield
    finally:
        for router, weight in before.items():
            router.weight = weight


@contextmanager
def fewer_routed(module: nn.Module, gone: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Within the block routers lack the rows of some experts (Lu et al., arXiv 2402.14800)."""
    before: dict[nn.Module, nn.Parameter] = {}
    hooks = []

    def renumber(kept: Tensor, _: nn.Module, __: Any, found: tuple[Tensor, ...]) -> Any:
        logits, scores, indices = found
        return logits, scores, kept[indices]

    try:
        for block, router in routers_of(module).items():
            kept = torch.tensor([e for e in range(N_EXPERTS) if e not in gone[block]])
            before[router] = weight = cast(nn.Parameter, router.weight)
            router.weight = nn.Parameter(weight.detach()[kept], requires_grad=False)
            hooks.append(router.register_forward_hook(partial(renumber, kept)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for router, weight in before.items():
            router.weight = weight


@contextmanager
def watched_routers(module: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """Within the block, what routers think of each token, (tokens, experts) per forward."""
    seen: dict[int, list[Tensor]] = {}

    def keep(block: int, _: nn.Module, __: Any, found: tuple[Tensor, ...]) -> None:
        seen.setdefault(block, []).append(found[0].detach().double().softmax(-1))

    hooks = [
        router.register_forward_hook(partial(keep, block))
        for block, router in routers_of(module).items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
