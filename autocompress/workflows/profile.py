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
from autocompress.report.progress import StudyProgress
from autocompress.report.sensitivity import sensitivity_page
from autocompress.search.option_table import OptionTable
from autocompress.workflows.probing import search_probe
from autocompress.workflows.session import Progress, open_session
from autocompress.workflows.settings import SearchSettings

PAGE = "sensitivity.html"
DOCUMENT = "profile.json"


@dataclass(frozen=True, slots=True)
class Profile:
    """What `profile` found.

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


def profile(
    model: str | Path,
    *,
    task: str = "auto",
    data: str | Path = "auto",
    space: str | Path = "joint",
    calibration_tokens: int = 8192,
    search_tokens: int = 2048,
    sequence_length: int = 256,
    seed: int = 0,
    empirical: bool = False,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    progress: bool = False,
) -> Profile:
    """Predict what each option of a space damages; the Python twin of ``autocompress profile``.

    Args:
        model: directory, hub id or ``package:NAME/FOLDER``.
        task: name of a task; ``auto`` reads it from the model's config.
        data: file, `datasets` directory, hub name or built-in; ``auto`` for the task's default.
        space: name of a shipped search space, or path of a YAML file.
        calibration_tokens: tokens for layer statistics.
        search_tokens: held-out tokens that damages are predicted for.
        sequence_length: tokens per sequence.
        seed: of the splits.
        empirical: take the data's labels instead of labels sampled from the model.
        trust_remote_code: let code of the model repository run.
        out: folder for the profile and its page; None keeps nothing.
        progress: show steps on stderr.

    Returns:
        The predictions; `Profile.table` has damage, in `Profile.unit`, and costs by choice and
        option, and `Profile.to_json` the document that ``--json`` prints.

    Raises:
        UsageError: an argument is wrong; its subclasses say which kind (model, data, space).
        RunDirectoryError: `out` cannot be written.
    """
    settings = SearchSettings(
        model=str(model), task=task, data=str(data), space=str(space), seed=seed, report_tokens=1,
        calibration_tokens=calibration_tokens, search_tokens=search_tokens,
        sequence_length=sequence_length, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    folder = None if out is None else Path(out)
    with StudyProgress(enabled=progress) as shown:
        return _predicted(settings, empirical, folder, shown)


def _predicted(
    settings: SearchSettings, empirical: bool, out: Path | None, progress: Progress
) -> Profile:
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
    found = Profile(session.settings, session.task.damage, n_tokens, empirical, table)
    if out is not None:
        _write(out, found)
    return found


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"--out must be a folder that can be written, but {folder} is not: {error}. "
            "Next step: give another folder."
        ) from error


def _write(out: Path, found: Profile) -> None:
    document = found.to_json()
    (out / DOCUMENT).write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    (out / PAGE).write_text(sensitivity_page(document), encoding="utf-8")
