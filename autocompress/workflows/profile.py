"""Profile a model: which layers it can least afford to damage, before anything is searched."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autocompress.bank import Bank
from autocompress.core.errors import RunDirectoryError
from autocompress.report.sensitivity import sensitivity_page
from autocompress.search.option_table import OptionTable
from autocompress.workflows.probing import search_probe
from autocompress.workflows.session import QUIET, Progress, open_session
from autocompress.workflows.settings import SearchSettings

PAGE = "sensitivity.html"
DOCUMENT = "profile.json"


@dataclass(frozen=True, slots=True)
class Profile:
    """What `profile_model` found.

    Attributes:
        settings: model, task, data and tokens, resolved.
        unit: metric that damages are in.
        n_tokens: search tokens, which the damages are predicted for.
        empirical: the data's labels were taken instead of sampled ones.
        table: predicted damage and costs of every option.
    """

    settings: SearchSettings
    unit: str
    n_tokens: int
    empirical: bool
    table: OptionTable

    def to_json(self) -> dict[str, Any]:
        """One JSON document."""
        settings = self.settings
        return {
            "model": settings.model,
            "task": settings.task,
            "data": settings.data,
            "space": settings.space,
            "unit": self.unit,
            "tokens": self.n_tokens,
            "empirical": self.empirical,
            "table": self.table.to_json(),
        }


def profile_model(
    settings: SearchSettings,
    *,
    empirical: bool = False,
    out: Path | None = None,
    progress: Progress = QUIET,
) -> Profile:
    """Predict the damage of every layer under every option of a space.

    Args:
        settings: model, task, data, space, calibration and search tokens, sequence length and seed
            count.
        empirical: take the data's labels instead of labels sampled from the model.
        out: folder for the profile, its page and what it was made from; None keeps nothing.
        progress: told when a long step starts.

    Raises:
        ModelError: the model cannot be loaded.
        DataError: the data cannot be read or is too short.
        SpaceError: the space does not fit the model.
        UsageError: `empirical`, and the task has no labels.
        RunDirectoryError: `out` cannot be written.
    """
    with ExitStack() as stack:
        cache = out or Path(stack.enter_context(TemporaryDirectory(prefix="autocompress-")))
        _require_writable(cache)
        session = open_session(settings, cache, progress)
        _ = session.space  # a bad space is refused before the long steps
        store = session.curvature(session.space.searched_layers, empirical=empirical)
        bank = Bank(cache / "bank", session.base.layout, session.weights, store.statistics)
        probe = search_probe(session, empirical=empirical)
        table = session.option_table(bank, store, probe=probe)
    n_tokens = session.splits.search.n_tokens
    profile = Profile(session.settings, session.task.damage, n_tokens, empirical, table)
    if out is not None:
        _write(out, profile)
    return profile


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"--out must be a folder that can be written, but {folder} is not: {error}. "
            "Next step: give another folder."
        ) from error


def _write(out: Path, profile: Profile) -> None:
    document = profile.to_json()
    (out / DOCUMENT).write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    (out / PAGE).write_text(sensitivity_page(document), encoding="utf-8")
