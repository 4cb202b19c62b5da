"""How forwards run fastest on this machine, and what that costs in precision."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from autocompress.core import Measurement, Quality
from autocompress.core.errors import UsageError, nearest
from autocompress.core.machine import usable_cores
from autocompress.evaluate.splits import Split, count_tokens
from autocompress.evaluate.task import Reference, Task

EXACT = "float32"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CUDA_ONLY = frozenset({"float16"})
_SAMPLE_TOKENS = 512
_MAX_NOISE = 0.01
_SWEEP_SECONDS = 15.0
_HOPELESS = 1.5
_ABOUT_AS_FAST = 0.95
_LONG_PASS = 2.0


@dataclass(frozen=True)
class ForwardPlan:
    """Dtype, batch and threads for search-time forwards.

    Attributes:
        dtype: as torch spells it without the prefix.
        batch_size: sequences per forward.
        threads: for `torch.set_num_threads`, in a process that has all cores to itself.
        noise: typical error of the damage due to the dtype, in its unit: the root mean square of
            the damage that the base model seems to take from the dtype alone. 0 for float32.
        retained_noise: the same of the retained quality.
        seconds_per_dtype: of one pass over the sample at the best batch and threads.
        noise_per_dtype: damage of the base model in that dtype against float32, with its spread.
        ruled_out: dtypes that were not chosen, each with the reason.
        n_tokens: of the sample.
        cores: of the machine that it was measured on; 0 if an earlier version did not say.
    """

    dtype: str
    batch_size: int
    threads: int
    noise: float = 0.0
    retained_noise: float = 0.0
    seconds_per_dtype: Mapping[str, float] = field(default_factory=dict)
    noise_per_dtype: Mapping[str, Measurement] = field(default_factory=dict)
    ruled_out: Mapping[str, str] = field(default_factory=dict)
    n_tokens: int = 0
    cores: int = 0

    def threads_on(self, cores: int) -> int:
        """Threads for forwards on a machine: as measured if it has as many cores, else all."""
        return self.threads if cores == self.cores else cores

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        noise = {name: m.to_json() for name, m in self.noise_per_dtype.items()}
        return {
            **data,
            "seconds_per_dtype": dict(self.seconds_per_dtype),
            "noise_per_dtype": noise,
            "ruled_out": dict(self.ruled_out),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ForwardPlan:
        """The inverse of `to_json`."""
        noise = {n: Measurement.from_json(m) for n, m in data["noise_per_dtype"].items()}
        return cls(**{**data, "noise_per_dtype": noise})


def with_noise(quality: Quality, *, damage: float, retained: float) -> Quality:
    """A quality whose errors hold the dtype's noise too, in quadrature.

    Args:
        quality: as measured.
        damage: `ForwardPlan.noise`.
        retained: `ForwardPlan.retained_noise`.
    """
    noisy = Measurement(quality.damage.value, math.hypot(quality.damage.standard_error, damage))
    return replace(
        quality,
        standard_error=math.hypot(quality.standard_error, retained),
        damage=noisy,
        metrics={n: noisy if m == quality.damage else m for n, m in quality.metrics.items()},
    )


@dataclass(frozen=True, slots=True)
class _Timing:
    seconds: float
    batch_size: int
    threads: int


@dataclass(frozen=True, slots=True)
class _Sample:
    """What every dtype is timed on, with the float32 model's outputs on it."""

    task: Task
    split: Split
    reference: Reference

    def run(self, module: nn.Module, batch_size: int) -> tuple[Quality, float]:
        """Quality of one pass, and its seconds."""
        start = time.perf_counter()
        quality = self.task.measure(module, self.split, self.reference, batch_size=batch_size)
        return quality, time.perf_counter() - start


def plan_forward(
    load: Callable[[str], nn.Module],
    task: Task,
    split: Split,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    required: str | None = None,
    threads: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1, 4, 16, 64),
    max_noise: float = _MAX_NOISE,
) -> ForwardPlan:
    """Measure which dtype, batch size and number of threads make forwards fastest here.

    A dtype whose matrix product is clearly slower than float32's is ruled out before the model is
    loaded in it: without hardware for it, bfloat16 is some thirty times slower. The others run a
    few sequences of the split against the float32 outputs; the fastest of those whose noise is
    acceptable is taken.

    Args:
        load: the base model in a dtype, on the device of the search.
        task: decides what a forward is.
        split: search tokens; its first sequences are the sample.
        dtypes: candidates; float32 is always measured, as the others' yardstick.
        required: take this dtype whatever its speed and noise.
        threads: candidates; all cores, half of them and one by default.
        batch_sizes: candidates.
        max_noise: largest acceptable damage due to the dtype.

    Raises:
        UsageError: a dtype is unknown.
    """
    for name in (*dtypes, *([required] if required else ())):
        if name not in _DTYPES:
            raise UsageError(f"Unknown dtype {name!r}. {nearest(name, _DTYPES)}")
    exact = load(EXACT)
    device = next(exact.parameters()).device
    sample_split = _head(split)
    counts = threads if threads is not None else _thread_counts()
    sizes = _sizes_worth_trying(batch_sizes, len(sample_split))
    with _threads_restored():
        torch.set_num_threads(max(counts))
        reference = task.reference(exact, sample_split, batch_size=sizes[0])
        sample = _Sample(task, sample_split, reference)
        timings = {EXACT: _sweep(sample, exact, counts, sizes)}
        del exact
        torch.set_num_threads(timings[EXACT].threads)
        wanted = [n for n in dict.fromkeys(dtypes) if n != EXACT and required in (None, n)]
        ruled_out = {} if required else _slow_kernels(wanted, device)
        qualities: dict[str, Quality] = {}
        for name in (n for n in wanted if n not in ruled_out):
            module = load(name)
            qualities[name], _ = sample.run(module, timings[EXACT].batch_size)
            timings[name] = _sweep(sample, module, counts, sizes)
    ruled_out.update(_noisy(qualities, max_noise) if required is None else {})
    return _plan(required, timings, qualities, ruled_out, sample_split.n_tokens)


def _plan(
    required: str | None,
    timings: Mapping[str, _Timing],
    qualities: Mapping[str, Quality],
    ruled_out: Mapping[str, str],
    n_tokens: int,
) -> ForwardPlan:
    allowed = [name for name in timings if name not in ruled_out]
    chosen = required or min(allowed, key=lambda name: timings[name].seconds)
    best, quality = timings[chosen], qualities.get(chosen)
    slower = {
        name: f"{timings[name].seconds / best.seconds:.1f} times the seconds of {chosen}"
        for name in allowed
        if name != chosen
    }
    return ForwardPlan(
        dtype=chosen,
        batch_size=best.batch_size,
        threads=best.threads,
        noise=_rms(quality.damage) if quality else 0.0,
        retained_noise=math.hypot(quality.retained - 1, quality.standard_error) if quality else 0.0,
        seconds_per_dtype={name: timing.seconds for name, timing in timings.items()},
        noise_per_dtype={name: quality.damage for name, quality in qualities.items()},
        ruled_out={**ruled_out, **slower},
        n_tokens=n_tokens,
        cores=usable_cores(),
    )


def _sweep(
    sample: _Sample, module: nn.Module, threads: Sequence[int], batch_sizes: Sequence[int]
) -> _Timing:
    """The best threads at the first batch size, then the best batch size at those threads.

    Stops early, with the best so far, when the model is so slow that the sweep would be felt.
    """
    end = time.perf_counter() + _SWEEP_SECONDS
    timings: list[_Timing] = []
    for count in sorted(threads, reverse=True):  # most likely first
        if not timings or time.perf_counter() < end:
            timings.append(_timed(sample, module, batch_sizes[0], count))
    best = _best(timings)
    for size in batch_sizes[1:]:
        if time.perf_counter() < end:
            timings.append(_timed(sample, module, size, best.threads))
    return _best(timings)


def _timed(sample: _Sample, module: nn.Module, batch_size: int, threads: int) -> _Timing:
    """The faster of two passes: on a shared machine the minimum is what the code costs."""
    torch.set_num_threads(threads)
    _, seconds = sample.run(module, batch_size)
    if seconds < _LONG_PASS:
        seconds = min(seconds, sample.run(module, batch_size)[1])
    return _Timing(seconds, batch_size, threads)


def _best(timings: Sequence[_Timing]) -> _Timing:
    """The fewest threads and the smallest batch of those that are about as fast as the fastest."""
    limit = min(timing.seconds for timing in timings) / _ABOUT_AS_FAST
    fast = [timing for timing in timings if timing.seconds <= limit]
    return min(fast, key=lambda timing: (timing.threads, timing.batch_size))


def _slow_kernels(dtypes: Sequence[str], device: torch.device) -> dict[str, str]:
    """Dtypes that this device multiplies clearly slower than float32, with the reason."""
    exact = _matmul_seconds(torch.float32, device)
    reasons: dict[str, str] = {}
    for name in dtypes:
        if name in _CUDA_ONLY and device.type != "cuda":
            reasons[name] = f"{name} is for CUDA devices"
            continue
        ratio = _matmul_seconds(_DTYPES[name], device) / exact
        if ratio > _HOPELESS:
            reasons[name] = f"a matrix product takes {ratio:.1f} times the seconds of {EXACT}"
    return reasons


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a product of (64, 512) and (512, 512): the best of three."""
    left = torch.full((64, 512), 0.5, dtype=dtype, device=device)
    right = torch.full((512, 512), 0.5, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _noisy(qualities: Mapping[str, Quality], max_noise: float) -> dict[str, str]:
    """Dtypes whose damage to the base model is too large, or not finite, with the reason."""
    return {
        name: f"it damages the base model by {quality.damage.value:.2g}, more than {max_noise:.2g}"
        for name, quality in qualities.items()
        if not _rms(quality.damage) <= max_noise
    }


def _rms(damage: Measurement) -> float:
    """Root mean square of a damage whose true value is 0."""
    error = damage.standard_error
    return math.hypot(damage.value, 0.0 if math.isnan(error) else error)


def _head(split: Split) -> Split:
    """The first sequences that hold enough tokens for timing, at least two of them."""
    totals = list(accumulate(map(count_tokens, split.examples)))
    enough = next((i + 1 for i, total in enumerate(totals) if total >= _SAMPLE_TOKENS), len(totals))
    return split.head(max(2, enough))


def _sizes_worth_trying(batch_sizes: Sequence[int], n_sequences: int) -> list[int]:
    """Sizes up to the first that takes the whole sample at once, a middling one first."""
    sizes = sorted(set(batch_sizes))
    useful = [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < n_sequences]
    middle = useful[len(useful) // 2]
    return [middle, *(size for size in useful if size != middle)]


def _thread_counts() -> list[int]:
    every = usable_cores()
    return sorted({1, max(1, every // 2), every})


@contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
