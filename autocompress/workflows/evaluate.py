"""Measure any model, compressed or not, on held-out tokens beside its base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from autocompress.core import Quality
from autocompress.core.errors import UsageError
from autocompress.cost import DEFAULT_PROFILE
from autocompress.export import Manifest, is_export, stored_bytes
from autocompress.export.exporter import Exporter
from autocompress.export.formats import EXPORTERS
from autocompress.models import load_base_model
from autocompress.models.loading import device_refusal
from autocompress.workflows.session import EXACT_DTYPE, QUIET, Progress, Session, open_session
from autocompress.workflows.settings import SearchSettings, resolve_model
from autocompress.workflows.tasks import recorded_details

_ANYWHERE = "cpu"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate_model` found.

    Attributes:
        model: what was evaluated.
        base: the base model that quality is relative to.
        settings: task, data and tokens.
        details: how the task read the models' outputs, e.g. their pooling.
        quality: on the report tokens.
        storage_bytes: bytes of the tensors of the model's files.
        base_storage_bytes: the same for the base model.
    """

    model: str
    base: str
    settings: SearchSettings
    details: Mapping[str, str]
    quality: Quality
    storage_bytes: int
    base_storage_bytes: int

    @property
    def size_reduction(self) -> float:
        """Base bytes over the model's bytes."""
        return self.base_storage_bytes / self.storage_bytes

    def to_json(self) -> dict[str, Any]:
        """One JSON document: model, base, task, data, bytes and quality."""
        return {
            "model": self.model,
            "base": self.base,
            "task": self.settings.task,
            **self.details,
            "data": self.settings.data,
            "tokens": self.quality.n_tokens,
            "storage_bytes": self.storage_bytes,
            "base_storage_bytes": self.base_storage_bytes,
            "size_reduction": self.size_reduction,
            "quality": self.quality.to_json(),
        }


def evaluate_model(
    model: str,
    *,
    base: str | None = None,
    task: str = "auto",
    data: str = "auto",
    tokens: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = QUIET,
) -> Evaluation:
    """Measure `model` on report tokens.

    Args:
        model: an export of this package, a model directory or a hub id.
        base: what quality is relative to; an export knows its own base, any other model is its
            own base unless one is given.
        task: name of a task, ``auto`` for the export's own or what the config says.
        data: as for a search; ``auto`` for the export's own or the task's default.
        tokens: how many report tokens; None for the export's own or the default.
        trust_remote_code: let code that ships with model and base run; an export's own settings
            never allow it.
        progress: told when a long step starts.

    Raises:
        ModelError: model or base cannot be loaded.
        CheckpointError: the export is damaged, or its code may not run.
        DataError: the data cannot be read or is too short.
    """
    path = Path(model)
    exported = path.is_dir() and is_export(path)
    as_measured = _claim_of(path) if exported else _fresh(base or model)
    settings = replace(
        as_measured.settings,
        model=base or as_measured.settings.model,
        task=as_measured.settings.task if task == "auto" else task,
        data=as_measured.settings.data if data == "auto" else data,
        report_tokens=tokens or as_measured.settings.report_tokens,
        # The settings of an export are a file of anyone's: the caller alone may allow code to run.
        trust_remote_code=trust_remote_code,
    )
    session = open_session(settings, cache=Path(), progress=progress)
    if as_measured.pooling is not None:
        session = replace(session, task=session.task.with_pooling(as_measured.pooling))
    quality = _measure(model, session, as_measured, exported)
    return Evaluation(
        model=model,
        base=settings.model,
        settings=session.settings,
        details=session.task.details,
        quality=quality,
        storage_bytes=_bytes_of(model, session, exported),
        base_storage_bytes=session.given.base_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Conditions:
    """Under what conditions a quality is measured."""

    settings: SearchSettings
    dtype: str
    batch_size: int
    pooling: str | None = None  # None: as the base model's pipeline says


def _claim_of(path: Path) -> _Conditions:
    """Those of the export's own claim."""
    measured: Mapping[str, Any] = Manifest.read(path).claim["measured"]
    settings = _here(SearchSettings.from_json(measured["settings"]))
    pooling = recorded_details(measured)["pooling"]
    return _Conditions(settings, str(measured["dtype"]), int(measured["batch_size"]), pooling)


def _here(settings: SearchSettings) -> SearchSettings:
    """Without what the machine of the search had and quality does not depend on."""
    device = _ANYWHERE if device_refusal(settings.device) else settings.device
    return replace(settings, device=device, device_profile=DEFAULT_PROFILE)


def _fresh(base: str) -> _Conditions:
    """Nothing is calibrated or searched, so all the data is left to the report split."""
    settings = SearchSettings(base, calibration_tokens=1, search_tokens=1)
    return _Conditions(settings, EXACT_DTYPE, batch_size=8)


def _measure(model: str, session: Session, under: _Conditions, exported: bool) -> Quality:
    split = session.splits.report
    base = session.compute_module(under.dtype)
    reference = session.reference(base, split, under.batch_size)
    session.progress.step(f"Measuring {model} on {split.n_tokens:,} report tokens")
    module = _load(model, session, base, under.dtype, exported)
    return session.task.measure(module, split, reference, batch_size=under.batch_size)


def _load(model: str, session: Session, base: nn.Module, dtype: str, exported: bool) -> nn.Module:
    device, trust = session.settings.device, session.settings.trust_remote_code
    if exported:
        return _exporter(Path(model)).load(
            Path(model), dtype=dtype, device=device, trust_remote_code=trust
        )
    if resolve_model(model) == resolve_model(session.settings.model):
        return base
    return load_base_model(
        resolve_model(model),
        session.task.auto_class,
        dtype=dtype,
        device=device,
        trust_remote_code=trust,
    ).module


def _exporter(path: Path) -> Exporter:
    return EXPORTERS[Manifest.read(path).checkpoint_format]


def _bytes_of(model: str, session: Session, exported: bool) -> int:
    if exported:
        return _exporter(Path(model)).stored_bytes(Path(model))
    if Path(resolve_model(model)).is_dir():
        return stored_bytes(Path(resolve_model(model)))
    if resolve_model(model) == session.base.source:
        return session.given.base_bytes
    raise UsageError(
        f"The size of {model!r} is that of its files, but it is no local directory. Next step: "
        "download it and give the directory."
    )
