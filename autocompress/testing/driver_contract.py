"""The contract of drivers, and a small trial context whose trials can be told to misbehave.

To hold a driver to the contract, subclass `DriverContract` in a test module and implement
`make_driver`; pytest collects the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from autocompress.core import (
    BASE_ALLOCATION,
    Allocation,
    LayerSpec,
    Measurement,
    Quality,
    Scheme,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.core.errors import SchemeError, TrialError
from autocompress.cost import DEFAULT_PROFILE, PROFILES, CostModel
from autocompress.evaluate import Corpus, CorpusKind, Example, Reference, Scores, Split, Task
from autocompress.methods import LayerStatistics
from autocompress.models import ModelLayout, version_counters, weight_matrix
from autocompress.search.context import TrialContext
from autocompress.search.driver import Driver
from autocompress.search.run_trial import run_trial
from autocompress.spaces.space import Choice, Option, SearchSpace
from autocompress.testing.scripted_bank import SCRIBBLE, ScriptedBank

WIDTH = 32
LAYERS = ("first", "second", "third")
WIDTHS = tuple(Scheme.parse(f"rtn(bits={bits},group_size=16)") for bits in (2, 4, 8))
_POWER = 0.86  # mean square of the base's outputs, rounded


class Chain(nn.Module):
    """Three linear layers with a nonlinearity between them, and a buffer no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name in LAYERS:
            linear = nn.Linear(WIDTH, WIDTH)
            linear.weight = _fixed((WIDTH, WIDTH), generator)
            linear.bias = _fixed((WIDTH,), generator)
            self.add_module(name, linear)
        self.gain: Tensor
        self.register_buffer("gain", torch.full((), 1.5), persistent=False)
        self.eval()

    def forward(self, values: Tensor) -> Tensor:
        """(n, width) to (n, width)."""
        for name in LAYERS:
            values = torch.tanh(self.get_submodule(name)(values)) * self.gain
        return values


def _fixed(shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    values = torch.randn(shape, generator=generator) / WIDTH**0.5
    return nn.Parameter(values, requires_grad=False)


class OutputError(Task):
    """Relative mean squared error of the outputs; writes to the model if a weight asks for it."""

    name = "output-error"
    auto_class = "none"
    corpus_kind = CorpusKind.TEXT
    default_data = None
    damage = "output_error"
    summary = "relative error of the outputs of the contract's model"

    def encode(
        self,
        corpus: Corpus,  # noqa: ARG002
        processor: object,  # noqa: ARG002
        *,
        sequence_length: int,  # noqa: ARG002
        seed: int,
        config: object = None,  # noqa: ARG002
    ) -> list[Example]:
        """Random inputs, one vector each."""
        return _inputs(seed)

    def batches(self, split: Split, batch_size: int) -> list[dict[str, Tensor]]:
        """Stacked vectors."""
        values = torch.stack([example["values"] for example in split.examples])
        return [{"values": part} for part in torch.split(values, batch_size)]

    def reference(self, module: nn.Module, split: Split, *, batch_size: int) -> Reference:
        """The base model's outputs."""
        return {"outputs": self._outputs(module, split, batch_size)}

    def rows(self, reference: Reference, split: Split, start: int, stop: int) -> Reference:  # noqa: ARG002
        """One vector is one sequence."""
        return {"outputs": reference["outputs"][start:stop]}

    def score(
        self, module: nn.Module, split: Split, reference: Reference, *, batch_size: int
    ) -> Scores:
        """The error of each vector relative to the outputs' typical power."""
        first, second = (cast(Tensor, module.get_submodule(n).weight) for n in LAYERS[:2])
        if float(first[0, 0]) == SCRIBBLE:
            second.mul_(2.0)
        base = reference["outputs"]
        outputs = self._outputs(module, split, batch_size)
        return {"error": ((outputs - base).square().mean(1) / _POWER).double()}

    def damages(self, scores: Scores) -> Tensor:
        """The errors."""
        return scores["error"]

    def summarise(self, scores: Scores, split: Split, reference: Reference) -> Quality:  # noqa: ARG002
        """Damage is the mean error."""
        errors = scores["error"]
        damage = Measurement(float(errors.mean()), float(errors.std()) / len(errors) ** 0.5)
        return Quality(
            1.0 - damage.value, damage.standard_error, damage, {self.damage: damage}, len(errors)
        )

    def tokens_per_pass(self, split: Split) -> int:  # noqa: ARG002
        """One vector is one token."""
        return 1

    def _outputs(self, module: nn.Module, split: Split, batch_size: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([module(b["values"]) for b in self.batches(split, batch_size)])


def _inputs(seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    return [{"values": torch.randn(WIDTH, generator=generator)} for _ in range(16)]


def _no_statistics(_: LayerSpec) -> LayerStatistics:
    return LayerStatistics.none()


def scripted_context(root: Path) -> TrialContext:
    """A context of milliseconds per trial, its bank in `root`."""
    module = Chain()
    layers = tuple(
        LayerSpec(name, "up", i, WIDTH, WIDTH, "linear", "float32", name, WIDTH * WIDTH)
        for i, name in enumerate(LAYERS)
    )
    layout = ModelLayout(
        layers, LAYERS, other_bytes=4 * WIDTH * len(LAYERS), other_macs_per_token=0
    )
    task = OutputError()
    split = Split("search", tuple(_inputs(seed=3)), 16)
    weights = {layer.name: weight_matrix(module, layer) for layer in layers}
    return TrialContext(
        module=module,
        layout=layout,
        bank=ScriptedBank(root, layout, weights, _no_statistics),
        task=task,
        split=split,
        reference=task.reference(module, split, batch_size=8),
        cost=CostModel(layers, layout.other_bytes, 0, PROFILES[DEFAULT_PROFILE]),
        batch_size=8,
        noise=0.0,
        threads=1,
    )


def scripted_space(
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8), group_sizes: Sequence[int] = (16,)
) -> SearchSpace:
    """One choice of bit width and group size per layer, and the base."""
    texts = [f"rtn(bits={b},group_size={g})" for b in bits for g in group_sizes]
    schemes = [*map(Scheme.parse, texts), Scheme()]
    choices = tuple(
        Choice(name, (name,), tuple(Option(str(s), (s,), i) for i, s in enumerate(schemes)))
        for name in LAYERS
    )
    return SearchSpace("scripted", "bit widths of three small layers", choices)


def scripted(number: int, scheme: str) -> TrialRequest:
    """A request that compresses the first layer by `scheme`, a method or a misbehaviour."""
    return TrialRequest(number, Allocation.of({"first": Scheme.parse(scheme)}), "test")


def value_of(result: TrialResult) -> TrialResult:
    """The result without what may differ between runs: the seconds."""
    return replace(result, seconds=0.0)


class DriverContract(ABC):
    """What every driver must do."""

    @abstractmethod
    def make_driver(self, context: TrialContext) -> Driver:
        """A driver on `context`."""

    def results(self, driver: Driver, requests: Sequence[TrialRequest]) -> list[TrialResult]:
        """All results, by number."""
        found = list(driver.run(iter(requests)))
        return sorted(found, key=lambda r: r.request.number)

    def test_each_request_is_answered_as_run_trial_would(self, tmp_path: Path) -> None:
        """In particular the base allocation."""
        requests = [scripted(i, f"rtn(bits={i + 2},group_size=16)") for i in range(5)]
        requests.append(TrialRequest(5, BASE_ALLOCATION, "baseline:base"))
        context = scripted_context(tmp_path / "bank")
        expected = [run_trial(r, context=scripted_context(tmp_path / "other")) for r in requests]
        with closing(self.make_driver(context)) as driver:
            results = self.results(driver, requests)
        assert [value_of(r) for r in results] == [value_of(r) for r in expected]
        assert all(r.is_complete for r in results)
        assert results[5].metrics is not None
        assert results[5].metrics.quality.damage.value == 0.0

    def test_failures_are_results_and_the_next_trial_is_sound(self, tmp_path: Path) -> None:
        """Failed, out of memory and not finite are told apart."""
        scripts = ["fail", "exhaust", "nan", "rtn(bits=8,group_size=16)"]
        context = scripted_context(tmp_path)
        with closing(self.make_driver(context)) as driver:
            results = self.results(driver, [scripted(i, s) for i, s in enumerate(scripts)])
        assert [r.status for r in results] == [
            TrialStatus.FAILED,
            TrialStatus.OUT_OF_MEMORY,
            TrialStatus.NOT_FINITE,
            TrialStatus.COMPLETE,
        ]
        assert results[0].error == "ValueError: scripted failure"
        assert [r.metrics is None for r in results] == [True, True, True, False]

    def test_a_request_is_taken_only_when_a_worker_is_free(self, tmp_path: Path) -> None:
        """So that what is asked can depend on what was answered."""
        context = scripted_context(tmp_path)
        answered = 0
        lead: list[int] = []

        def requests() -> Iterator[TrialRequest]:
            for number in range(8):
                lead.append(number - answered)
                yield scripted(number, f"rtn(bits={number % 7 + 2},group_size=16)")

        with closing(self.make_driver(context)) as driver:
            for _ in driver.run(requests()):
                answered += 1
            n_workers = driver.n_workers
        assert answered == 8
        assert max(lead) < n_workers

    def test_it_runs_again_after_a_run_was_closed(self, tmp_path: Path) -> None:
        """Closing the generator drops what is running and leaves the driver usable."""
        context = scripted_context(tmp_path)
        requests = [scripted(i, f"rtn(bits={i + 2},group_size=16)") for i in range(4)]
        with closing(self.make_driver(context)) as driver:
            with closing(driver.run(iter(requests))) as run:
                next(run)
            assert [r.request for r in self.results(driver, requests)] == requests

    def test_an_empty_source_ends_at_once(self, tmp_path: Path) -> None:
        """No request, no result; no layer, no name."""
        with closing(self.make_driver(scripted_context(tmp_path))) as driver:
            assert list(driver.run(iter(()))) == []
            assert list(driver.fill({})) == []

    def test_a_layer_is_in_the_bank_when_it_is_named(self, tmp_path: Path) -> None:
        """Each once, and what is there is what any bank would hold."""
        context, other = (scripted_context(tmp_path / name) for name in ("bank", "other"))
        named = []
        with closing(self.make_driver(context)) as driver:
            for name in driver.fill(dict.fromkeys(LAYERS, WIDTHS)):
                named.append(name)
                assert all(context.bank.path(name, scheme).is_file() for scheme in WIDTHS)
            assert set(driver.fill(dict.fromkeys(LAYERS, WIDTHS))) == set(LAYERS)
        assert sorted(named) == sorted(LAYERS)
        for name, scheme in product(LAYERS, WIDTHS):
            tensors = context.bank.packed(name, scheme).tensors
            expected = other.bank.packed(name, scheme).tensors
            assert all(torch.equal(tensors[k], expected[k]) for k in expected)

    def test_a_layer_that_cannot_be_compressed_is_an_error_for_who_asks(
        self, tmp_path: Path
    ) -> None:
        """Here or in the bank, and the driver is sound after it."""
        context = scripted_context(tmp_path)
        bad = Scheme.parse("rtn(bits=77)")
        with closing(self.make_driver(context)) as driver:
            error: SchemeError | None = None
            try:
                for name in driver.fill({"first": (bad,)}):
                    context.bank.packed(name, bad)
            except SchemeError as caught:
                error = caught
            assert "77" in str(error)
            assert list(driver.fill({"first": WIDTHS})) == ["first"]

    def test_trials_run_after_filling_was_closed(self, tmp_path: Path) -> None:
        """Closing the generator drops what is under way and leaves the driver usable."""
        with closing(self.make_driver(scripted_context(tmp_path))) as driver:
            with closing(driver.fill(dict.fromkeys(LAYERS, WIDTHS))) as filled:
                next(filled)
            assert all(r.is_complete for r in self.results(driver, [scripted(0, "rtn(bits=4)")]))

    def test_the_base_model_is_left_as_it_was(self, tmp_path: Path) -> None:
        """Bit for bit, and without a write that was undone."""
        context = scripted_context(tmp_path)
        before = {n: t.clone() for n, t in context.module.state_dict().items()}
        counters = version_counters(context.module)
        requests = [scripted(i, s) for i, s in enumerate(["rtn(bits=2)", "fail", "nan"])]
        with closing(self.make_driver(context)) as driver:
            self.results(driver, requests)
        assert version_counters(context.module) == counters
        for name, tensor in context.module.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def test_a_trial_that_writes_to_the_base_model_fails(self, tmp_path: Path) -> None:
        """Later trials are either right or refused, never silently wrong."""
        sound = "rtn(bits=4,group_size=16)"
        expected = run_trial(scripted(1, sound), context=scripted_context(tmp_path / "other"))
        requests = iter([scripted(0, "scribble"), scripted(1, sound)])
        results: list[TrialResult] = []
        driver = self.make_driver(scripted_context(tmp_path / "bank"))
        with closing(driver), suppress(TrialError):
            for result in driver.run(requests):
                results.append(result)
        by_number = {r.request.number: r for r in results}
        assert by_number[0].status is TrialStatus.FAILED
        assert "second.weight" in by_number[0].error
        if 1 in by_number:
            assert by_number[1].metrics == expected.metrics
