"""From the options that a file writes to schemes, with ratios left as they are. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from autocompress.core.errors import SchemeError, SpaceError
from autocompress.core.scheme import OptionValue, Scheme, Stage
from autocompress.spaces.schema import NONE, STAGE_KEYS, Grid, OptionSpec, StageAlternative
from autocompress.spaces.schema import StageGrid as StageSpec
from autocompress.spaces.source import Source


@dataclass(frozen=True)
class WrittenOption:
    """One option of a choice as the file means it, before it meets a layer.

    Attributes:
        scheme: may hold `parameter_ratio` where the method wants a rank.
        where: place in the file, for messages.
        stage_keys: for an option of a grid, the key under which each stage was written.
    """

    scheme: Scheme
    where: str
    stage_keys: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        """The text of the scheme."""
        return str(self.scheme)


def expand(options: Sequence[OptionSpec], source: Source, choice: int) -> list[WrittenOption]:
    """All options of choice number `choice`, in the order of the file.

    Raises:
        SpaceError: the text of a scheme or stage cannot be read.
    """
    written: list[WrittenOption] = []
    for index, option in enumerate(options):
        where = source.at(("choices", choice, "options", index))
        if isinstance(option, Grid):
            written.extend(_expand_grid(option, where))
        else:
            written.append(WrittenOption(_parse_scheme(option, where), where))
    return written


def _expand_grid(grid: Grid, where: str) -> Iterator[WrittenOption]:
    per_key = [list(_alternatives(getattr(grid, key), f"{where}.{key}")) for key in STAGE_KEYS]
    for combination in product(*per_key):
        present = [(k, s) for k, s in zip(STAGE_KEYS, combination, strict=True) if s is not None]
        keys = tuple(key for key, _ in present)
        yield WrittenOption(Scheme(tuple(stage for _, stage in present)), where, keys)


def _alternatives(written: Sequence[StageAlternative], where: str) -> Iterator[Stage | None]:
    for index, alternative in enumerate(written):
        if isinstance(alternative, StageSpec):
            yield from _expand_stage(alternative)
        elif alternative == NONE:
            yield None
        else:
            yield _parse_stage(alternative, f"{where}[{index}]")


def _expand_stage(stage: StageSpec) -> Iterator[Stage]:
    """The product of the option values, the first option varying slowest."""
    options: dict[str, OptionValue | list[OptionValue]] = stage.__pydantic_extra__
    values = [value if isinstance(value, list) else [value] for value in options.values()]
    for combination in product(*values):
        yield Stage.of(stage.method, dict(zip(options, combination, strict=True)))


def _parse_scheme(text: str, where: str) -> Scheme:
    try:
        return Scheme.parse(text)
    except SchemeError as error:
        raise SpaceError(f"{where}: {error}{_quoting_hint(text)}") from error


def _parse_stage(text: str, where: str) -> Stage:
    try:
        return Stage.parse(text)
    except SchemeError as error:
        raise SpaceError(f"{where}: {error}{_quoting_hint(text)}") from error


def _quoting_hint(text: str) -> str:
    if text.count("(") == text.count(")"):
        return ""
    return " In a [...] list YAML splits text at commas: put quotes around a scheme that has one."
