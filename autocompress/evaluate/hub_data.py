"""Data through the ``datasets`` library, imported only when it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from autocompress.core.errors import DataError, nearest
from autocompress.evaluate.readers import SUFFIXES, Row

_MARKERS = ("dataset_info.json", "state.json", "dataset_dict.json")
_PREFERRED_SPLITS = ("validation", "test", "train")  # the labels of test are often hidden
_MAX_ROWS = 200_000


def read_directory(path: Path) -> list[Row]:
    """Rows of a directory that ``datasets`` wrote with ``save_to_disk``.

    Raises:
        DataError: it is another kind of directory, empty or damaged.
    """
    if not any((path / marker).is_file() for marker in _MARKERS):
        files = [p.name for p in path.iterdir()]
        raise DataError(
            f"A data directory is one that datasets' save_to_disk wrote, but {str(path)!r} is "
            f"not: it holds {', '.join(sorted(files)[:5]) or 'nothing'}. Name one file in it, or "
            "save a data set there."
        )
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"The data directory {str(path)!r} is damaged: {_line(error)}") from error
    return _rows(_one_split(loaded), str(path))


def read_hub(name: str, *, known: Iterable[str]) -> list[Row]:
    """Rows of a data set on the Hugging Face hub (or in its cache).

    Args:
        name: ``name``, ``name:configuration`` or ``name:configuration:split``; without a split,
            validation, else test, else train.
        known: names of built-in data, for the error message.

    Raises:
        DataError: there is no such data set, or no network.
    """
    import datasets

    repository, _, rest = name.partition(":")
    configuration, _, split = rest.partition(":")
    try:
        loaded = datasets.load_dataset(
            repository,
            configuration or None,
            split=split or None,
            download_config=datasets.DownloadConfig(max_retries=1),
        )
    except (OSError, ValueError, RuntimeError) as error:
        files = [p.name for p in Path().iterdir() if p.suffix in SUFFIXES]
        raise DataError(
            f"The data {name!r} is no file here and could not be had from the Hugging Face hub: "
            f"{_line(error)} {nearest(name, [*known, *files])} Without a network, name a file or "
            "'python-docs'."
        ) from error
    return _rows(_one_split(loaded), name)


def _one_split(loaded: Any) -> Any:
    """The data set itself, or the split of a dictionary of them that is best left for judging."""
    if not isinstance(loaded, dict):
        return loaded
    names: Sequence[str] = list(loaded)
    return loaded[next((s for s in _PREFERRED_SPLITS if s in names), names[0])]


def _rows(dataset: Any, source: str) -> list[Row]:
    if len(dataset) == 0:
        raise DataError(f"The data {source!r} is empty: it has no rows.")
    if len(dataset) > _MAX_ROWS:
        dataset = dataset.shuffle(seed=0).select(range(_MAX_ROWS))
    rows: list[Row] = list(dataset)
    names = getattr(dataset.features.get("label"), "names", None)
    if names:
        # -1 stands for a hidden label; it stays, and is refused where labels are needed
        rows = [{**r, "label": names[r["label"]] if r["label"] >= 0 else -1} for r in rows]
    return rows


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") + "."
