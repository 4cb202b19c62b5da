"""The one place that assembles model, data, space, bank and costs for a study.

A session is what search, export, evaluation and verification have in common: the base model, the
task, the three splits of tokens and the layer bank, all derived from the settings alone, so that
every verb that opens the same settings sees the same model and the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from autocompress.bank import DEFAULT_DENSE_BYTES, Bank
from autocompress.core import BASE_ALLOCATION, LayerSpec, Resources, Scheme, digest
from autocompress.core.errors import DataError
from autocompress.cost import CostModel, find_profile
from autocompress.evaluate import (
    ForwardPlan,
    Reference,
    Split,
    Splits,
    Task,
    TaskLoss,
    curvature_batches,
    load_corpus,
    make_splits,
    plan_forward,
)
from autocompress.export.targets import space_for
from autocompress.fronts import parse_bytes
from autocompress.methods import LayerStatistics, Needs
from autocompress.models import (
    CurvatureStore,
    ModelLayout,
    StatisticsStore,
    collect_curvature,
    collect_statistics,
    holds_curvature,
    weight_matrix,
)
from autocompress.models.curvature_pass import TEMPERING
from autocompress.models.loading import (
    BaseModel,
    load_base_model,
    load_config,
    load_processor,
)
from autocompress.models.rotation import in_dtype, rotated_base
from autocompress.search.build_table import Fill, build_option_table
from autocompress.search.memory import enough_memory
from autocompress.search.option_table import OptionTable
from autocompress.search.probe import Probe
from autocompress.spaces import SearchSpace
from autocompress.workflows import reach
from autocompress.workflows.settings import SearchSettings, resolve_model
from autocompress.workflows.tasks import in_words, task_on


class Progress(Protocol):
    """Told what takes long."""

    def step(self, text: str) -> None:
        """A long step starts."""

    def advance(self, done: int, total: int) -> None:
        """The current step has done so much."""


class Quiet:
    """A `Progress` that says nothing."""

    def step(self, text: str) -> None:
        """See `Progress`."""

    def advance(self, done: int, total: int) -> None:
        """See `Progress`."""


_SHARES_OF_A_GPU = 4  # the others: model, activations and logits, what compression needs
EXACT_DTYPE = "float32"

QUIET: Progress = Quiet()


@dataclass(frozen=True)
class Session:
    """A base model with its task, tokens and space.

    Attributes:
        settings: with task and data resolved.
        base: the base model in its checkpoint's dtype.
        task: what is evaluated.
        splits: calibration, search and report tokens.
        cache: directory for layer statistics and the bank.
        progress: told when a long step starts.
        given: layout of the model as it was given, which sizes are relative to. That of `base`,
            unless the settings rotate the model.
        unread: names of the layers that read nothing in the first forward.
    """

    settings: SearchSettings
    base: BaseModel
    task: Task
    splits: Splits
    cache: Path
    progress: Progress
    given: ModelLayout
    unread: frozenset[str]

    @cached_property
    def space(self) -> SearchSpace:
        """The search space on this model, restricted to the target and to what tokens reach."""
        settings, routed = self.settings, reach.routed_tokens(self)
        whole = space_for(settings.target, settings.space, self.base, routed)
        return reach.reached_space(self, whole)

    @cached_property
    def cost(self) -> CostModel:
        """Costs on the named device."""
        return replace(self._cost_of(self.base.layout), searched_layers=self.space.searched_layers)

    @property
    def given_resources(self) -> Resources:
        """Costs of the model as it was given, which all others are relative to."""
        return self._cost_of(self.given).resources(BASE_ALLOCATION)

    def _cost_of(self, layout: ModelLayout) -> CostModel:
        return CostModel(
            layers=layout.layers,
            other_bytes=layout.other_bytes,
            other_macs_per_token=layout.other_macs_per_token,
            profile=find_profile(self.settings.device_profile),
            tokens_per_pass=self.task.tokens_per_pass(self.splits.report),
        )

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """Weight matrices (o, d) of the checkpoint, by layer name; views, never copies."""
        module = self.base.module
        return {layer.name: weight_matrix(module, layer) for layer in self.base.layout.layers}

    def compute_module(self, dtype: str) -> nn.Module:
        """The base model in `dtype`: the resident one if that is the checkpoint's, else loaded."""
        if dtype == self.checkpoint_dtype:
            return self.base.module
        if self.is_rotated:
            return in_dtype(self.base.module, getattr(torch, dtype))
        return self._load(dtype)

    @property
    def is_rotated(self) -> bool:
        """True if the base model is not the one that was given, but that one rotated."""
        return self.settings.rotate != "none"

    @property
    def checkpoint_dtype(self) -> str:
        """The dtype that the checkpoint is stored and deployed in."""
        return str(next(self.base.module.parameters()).dtype).removeprefix("torch.")

    def _load(self, dtype: str) -> nn.Module:
        settings = self.settings
        return load_base_model(
            self.base.source,
            self.task.auto_class,
            dtype=dtype,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
        ).module

    def plan(self) -> ForwardPlan:
        """How search-time forwards run here: measured, or as `--dtype` says.

        Raises:
            UsageError: memory does not hold the model in float32, which all noise is relative to.
        """
        self.progress.step("Measuring which dtype is fastest for forwards on this machine")
        wanted = self.settings.dtype
        required = None if wanted == "auto" else wanted
        dtypes = tuple(dict.fromkeys((EXACT_DTYPE, required or "bfloat16")))
        with self._room("Measuring forwards takes the model in float32 beside itself"):
            load, split = self.compute_module, self.splits.search
            return plan_forward(load, self.task, split, dtypes=dtypes, required=required)

    def _room(self, need: str) -> AbstractContextManager[None]:
        return enough_memory(self.settings.device, need)

    def report_dtype(self, plan: ForwardPlan) -> str:
        """The dtype that the front is published in.

        The checkpoint's own, as it is deployed; float32 where the search found that fastest (a
        machine without fast 16-bit products), since it holds every 16-bit weight exactly.
        """
        return EXACT_DTYPE if plan.dtype == EXACT_DTYPE else self.checkpoint_dtype

    def bank(self, statistics_dtype: str) -> Bank:
        """The layer bank.

        Args:
            statistics_dtype: dtype of the forwards that layer statistics come from; they are
                collected now if the cache lacks them.
        """
        size = self.settings.bank_size
        return Bank(
            root=self.cache / "bank",
            layout=self.base.layout,
            weights=self.weights,
            statistics=self.statistics(statistics_dtype),
            capacity_bytes=None if size is None else parse_bytes(size),
            dense_bytes=self._dense_bytes(),
        )

    def _dense_bytes(self) -> int:
        """Memory for decoded matrices: on a GPU a share of what is free there."""
        device = torch.device(self.settings.device)
        if device.type != "cuda":
            return DEFAULT_DENSE_BYTES
        free: int = torch.cuda.mem_get_info(device)[0]
        return free // (_SHARES_OF_A_GPU * self.settings.workers)

    def curvature(self, layers: Collection[str], *, empirical: bool = False) -> CurvatureStore:
        """Curvature of the damage at these layers, collected now where the cache lacks it.

        Args:
            layers: names.
            empirical: take the data's labels instead of labels sampled from the model.

        Raises:
            UsageError: the task has no loss to differentiate, or `empirical` and no labels.
        """
        split, seed = self.splits.calibration, self.settings.seed
        facts = ["curvature", 1, self.base.digest, split.digest, EXACT_DTYPE, empirical, seed]
        key = digest([*facts, TEMPERING, *self.task.facts])
        store = CurvatureStore(self.cache / "curvature" / key)
        if holds_curvature(store, self.base.layout, layers):
            return store
        self.progress.step(f"Differentiating the model on {split.n_tokens:,} calibration tokens")
        with self._room("Curvature takes the model in float32, its activations and gradients"):
            module = self.compute_module(EXACT_DTYPE)
            collect_curvature(
                module,
                self.base.layout,
                curvature_batches(self.task, module, split),
                TaskLoss(self.task, empirical),
                store,
                layers=layers,
                seed=seed,
                progress=self.progress.advance,
            )
        return store

    @cached_property
    def searched_curvature(self) -> CurvatureStore:
        """Curvature at every searched layer, by labels that the model samples."""
        return self.curvature(self.space.searched_layers)

    def option_table(
        self,
        bank: Bank,
        curvature: CurvatureStore,
        fill: Fill | None = None,
        probe: Probe | None = None,
    ) -> OptionTable:
        """Predicted damage and costs of every option of the space, kept in the cache.

        Args:
            bank: of this session; filled on the way, unless the cache holds the table.
            curvature: at every searched layer.
            fill: compresses into the bank, e.g. `Driver.fill`; None for threads of this process.
            probe: corrects the predictions; see `workflows.probing`.
        """
        n_threads = torch.get_num_threads() if self.settings.device == "cpu" else 1
        fill = fill or partial(bank.fill_by_layer, n_threads=n_threads)

        def announced(wanted: Mapping[str, Sequence[Scheme]]) -> Generator[str, None, None]:
            self.progress.step("Compressing every layer with every option")
            return fill(wanted)

        return build_option_table(
            self.space,
            self.base.layout,
            bank,
            curvature=curvature.get,
            cost=self.cost,
            weights=self.weights,
            fill=announced,
            probe=probe,
            cache=self.cache / "tables",
            progress=self.progress.advance,
        )

    def statistics(self, dtype: str) -> Callable[[LayerSpec], LayerStatistics]:
        """Of the inputs of each layer, as methods use them; `dtype` as for `bank`."""
        layers = {name for name, want in reach.layer_needs(self.space).items() if want > Needs.NONE}
        if not layers:
            return _no_statistics
        if self.settings.token_weighting == "gradient":
            return self.searched_curvature.statistics
        split = self.splits.calibration
        key = digest(["statistics", 1, self.base.digest, split.digest, dtype])
        store = StatisticsStore(self.cache / "statistics" / key)
        inputs = {self.base.layout.layer(name).input_name for name in layers} - {None}
        if any(name not in store for name in inputs):
            self.progress.step(f"Collecting layer statistics on {split.n_tokens:,} tokens")
            batches = self.task.batches(split, reach.CALIBRATION_BATCH)
            with self._room(f"Layer statistics take the model in {dtype} and its activations"):
                collect_statistics(
                    self.compute_module(dtype),
                    self.base.layout,
                    batches,
                    store,
                    layers=layers,
                    progress=self.progress.advance,
                )
        return store.get

    def reference(self, module: nn.Module, split: Split, batch_size: int) -> Reference:
        """Outputs of the base model on `split`, computed once for each dtype and batch size.

        Those of a rotated model are relative to the model as it was given.

        Args:
            module: the base model, in any dtype.
            split: the tokens.
            batch_size: sequences per forward.
        """
        key = (split.digest, next(module.parameters()).dtype, batch_size)
        if key not in self._references:
            about = f"{split.n_tokens:,} {split.name} tokens"
            self.progress.step(f"Evaluating the base model on {about}")
            dtype = str(key[1]).removeprefix("torch.")
            with self._room(f"The base model's outputs take {dtype} activations"):
                given = self._load(dtype) if self.is_rotated else module
                self._references[key] = self.task.reference(given, split, batch_size=batch_size)
        return self._references[key]

    @cached_property
    def _references(self) -> dict[tuple[str, torch.dtype, int], Reference]:
        return {}


def open_session(settings: SearchSettings, cache: Path, progress: Progress = QUIET) -> Session:
    """Load model and data and cut the tokens into three disjoint splits.

    Raises:
        ModelError: the model cannot be loaded or does not fit the task, or its embeddings are
            pooled in a way that is not built here.
        DataError: the data cannot be read, or is too short for the splits.
        UnknownNameError: no such task or device profile.
    """
    source = resolve_model(settings.model)
    trust = settings.trust_remote_code
    config = load_config(source, trust_remote_code=trust)
    task = task_on(source, config, settings.task)
    _ = find_profile(settings.device_profile)
    data = task.default_data if settings.data == "auto" else settings.data
    if data is None:
        raise DataError(
            f"The task {task.name} needs {task.corpus_kind} and has no default data. Next step: "
            "give --data with a JSON Lines, CSV or Parquet file, or a `datasets` directory."
        )
    progress.step(f"Reading {data} for {in_words(task)}")
    corpus = load_corpus(data, kind=task.corpus_kind)
    progress.step(f"Loading {settings.model}")
    with enough_memory(settings.device, f"Loading {settings.model} takes all its weights"):
        base = load_base_model(
            source, task.auto_class, dtype="auto", device=settings.device, trust_remote_code=trust
        )
    given = base.layout
    if settings.rotate != "none":
        progress.step("Rotating the residual stream")
        base = rotated_base(base, seed=settings.seed)
    processor = load_processor(source, trust_remote_code=trust)
    examples = task.encode(
        corpus,
        processor,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        config=config,
    )
    splits = make_splits(
        examples,
        calibration_tokens=settings.calibration_tokens,
        search_tokens=settings.search_tokens,
        report_tokens=settings.report_tokens,
        seed=settings.seed,
    )
    base, unread = reach.described_as_read(base, task, splits.calibration)
    resolved = settings.with_resolved(task=task.name, data=data)
    return Session(resolved, base, task, splits, cache, progress, given, unread)


def _no_statistics(_: LayerSpec) -> LayerStatistics:
    return LayerStatistics.none()
