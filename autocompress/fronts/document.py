"""`front.json`: a published front with its baselines, read and written as one value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from autocompress.core import DEFAULT_OBJECTIVES, Objectives
from autocompress.core.errors import NoAnswerError, RunDirectoryError, nearest
from autocompress.core.files import write_atomically
from autocompress.fronts.comparison import Comparison, against_baselines
from autocompress.fronts.difference import Differences, unpaired
from autocompress.fronts.entries import (
    BaseEntry,
    BudgetSpent,
    Finalized,
    Member,
    MemberQuality,
    ReferencePoint,
    StudySummary,
)
from autocompress.fronts.front import Front
from autocompress.fronts.geometry import hypervolume
from autocompress.fronts.picking import PICK_RULES, find_member, knee_of, parse_bytes, pick

__all__ = [
    "FRONT_FILE",
    "PICK_RULES",
    "SCHEMA_VERSION",
    "BaseEntry",
    "BudgetSpent",
    "Finalized",
    "FrontDocument",
    "Member",
    "MemberQuality",
    "ReferencePoint",
    "StudySummary",
    "find_member",
    "front_schema",
    "parse_bytes",
    "pick",
    "relative_hypervolume",
    "validate",
]

FRONT_FILE = "front.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class FrontDocument:
    """A published front.

    Attributes:
        study: what was searched and with what.
        base: the uncompressed model.
        baselines: allocations that need no search, each with a name.
        members: no measured model beats any of them in retained quality and every optimized
            resource at once; least of the main resource first.
        reference_point: corner of the hypervolume's box.
        hypervolume: of the members; see `relative_hypervolume`.
        comparisons: of each baseline with a searched model at no more of each optimized resource;
            empty in files of versions that did not compare.
        objectives: what the front is over; quality and bytes in files that do not say.
    """

    study: StudySummary
    base: BaseEntry
    baselines: tuple[Member, ...]
    members: tuple[Member, ...]
    reference_point: ReferencePoint
    hypervolume: float
    comparisons: tuple[Comparison, ...] = ()
    objectives: Objectives = DEFAULT_OBJECTIVES

    @classmethod
    def of(
        cls,
        study: StudySummary,
        base: BaseEntry,
        baselines: Iterable[Member],
        candidates: Iterable[Member],
        reference_point: ReferencePoint | None = None,
        *,
        differences: Differences = unpaired,
        objectives: Objectives = DEFAULT_OBJECTIVES,
        searched: Mapping[str, float] = MappingProxyType({}),
    ) -> FrontDocument:
        """The front of everything that was measured, with its knee and hypervolume.

        Args:
            study: what was searched.
            base: the uncompressed model.
            baselines: they compete too: one that nothing beats is a member.
            candidates: measured members in any order; of equal ids the first one counts, and one
                whose retained quality, or an optimized resource, is NaN is left out.
            reference_point: by default a model that retains nothing at the costs of the base.
            differences: what separates a member from a baseline; see `paired`.
            objectives: what the front is over.
            searched: damage on search tokens by id, which chooses what baselines are compared with.
        """
        named = tuple(baselines)
        distinct = {m.id: m for m in reversed((*candidates, *named))}
        costs = objectives.costs
        front = Front.of(distinct.values(), lambda m: (*costs(m), -m.quality.retained))
        corner = reference_point or ReferencePoint.of(objectives)
        members = _with_knee(sorted(front, key=lambda m: (costs(m), m.id)), objectives)
        return cls(
            study=study,
            base=base,
            baselines=named,
            members=members,
            reference_point=corner,
            hypervolume=relative_hypervolume(
                ((m.quality.retained, *costs(m)) for m in front), costs(base), corner
            ),
            comparisons=against_baselines(
                members,
                named,
                differences,
                objectives,
                candidates=tuple(distinct.values()),
                searched=searched,
            ),
            objectives=objectives,
        )

    @property
    def knee(self) -> Member | None:
        """The member marked as knee; None in an empty front."""
        return next((member for member in self.members if member.is_knee), None)

    @property
    def most_cost_efficient(self) -> Member | None:
        """What `pick` by cost efficiency takes without constraints; None if nothing fits."""
        try:
            return pick(self)
        except NoAnswerError:
            return None

    def to_json(self) -> dict[str, Any]:
        """The JSON document, as the schema describes it."""
        compared = [comparison.to_json() for comparison in self.comparisons]
        return {
            "schema_version": SCHEMA_VERSION,
            "optimize": self.objectives.text,
            "study": self.study.to_json(),
            "base": self.base.to_json(),
            "baselines": [member.to_json() for member in self.baselines],
            "reference_point": self.reference_point.to_json(),
            "hypervolume": self.hypervolume,
            "members": [member.to_json() for member in self.members],
            **({"comparisons": compared} if compared else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FrontDocument:
        """The inverse of `to_json`, for data that fits the schema."""
        return cls(
            study=StudySummary.from_json(data["study"]),
            base=BaseEntry.from_json(data["base"]),
            baselines=tuple(Member.from_json(m) for m in data["baselines"]),
            members=tuple(Member.from_json(m) for m in data["members"]),
            reference_point=ReferencePoint.from_json(data["reference_point"]),
            hypervolume=float(data["hypervolume"]),
            comparisons=tuple(Comparison.from_json(c) for c in data.get("comparisons", ())),
            objectives=Objectives.parse(data.get("optimize", DEFAULT_OBJECTIVES.text)),
        )

    def write(self, path: str | Path) -> Path:
        """Write `front.json` by atomic rename: a reader sees the old file or the new one.

        Args:
            path: the run directory, or the file itself.

        Returns:
            The file.

        Raises:
            RunDirectoryError: the directory is missing, read-only or full; what was there stays.
        """
        file = _front_file(Path(path))
        data = self.to_json()
        validate(data, str(file))
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        try:
            write_atomically(file, text)
        except OSError as error:
            raise RunDirectoryError(
                f"{file} cannot be written ({error.strerror or error}); an earlier file is "
                "untouched. Next step: check free space and permissions of the directory."
            ) from error
        return file

    @classmethod
    def read(cls, path: str | Path) -> FrontDocument:
        """Read and validate `front.json`.

        Args:
            path: the run directory, or the file itself.

        Raises:
            RunDirectoryError: it is missing, damaged or from a newer version.
        """
        file = _front_file(Path(path))
        data = _load(file)
        validate(data, str(file))
        return cls.from_json(data)


def relative_hypervolume(
    points: Iterable[tuple[float, ...]], base: Sequence[float], reference: ReferencePoint
) -> float:
    """Volume that models dominate, over quality loss and resources relative to the base.

    Quality loss is 1 - retained, and 0 for a model that retains more than 1, so that noise above
    the base does not count as progress and the volume is bounded by the reference box.

    Args:
        points: retained quality, then the optimized resources, of each model; NaN adds nothing.
        base: the same resources of the base model, above 0.
        reference: worst corner of the box.
    """
    box = [
        (max(1.0 - retained, 0.0), *(own / whole for own, whole in zip(costs, base, strict=True)))
        for retained, *costs in points
    ]
    return hypervolume(box, reference.coordinates) if box else 0.0


@cache
def front_schema() -> dict[str, Any]:
    """The JSON Schema of `front.json`."""
    text = Path(__file__).with_name("front.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def validate(data: object, origin: str) -> None:
    """Check a JSON document against the schema of `front.json`.

    Args:
        data: the parsed document.
        origin: where it comes from, for the message.

    Raises:
        RunDirectoryError: naming the place in the document and what is wrong with it, or saying
            that a newer version wrote it.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RunDirectoryError(
            f"{origin} has schema version {version}, but this version of autocompress reads up "
            f"to {SCHEMA_VERSION}. Next step: pip install --upgrade autocompress."
        )
    error = best_match(Draft202012Validator(front_schema()).iter_errors(data))
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "the document"
        _damaged(origin, f"at {place}: {error.message[:200]}")


def _with_knee(members: list[Member], objectives: Objectives) -> tuple[Member, ...]:
    if not members:
        return ()
    knee = knee_of(members, objectives)
    return tuple(replace(member, is_knee=i == knee) for i, member in enumerate(members))


def _front_file(path: Path) -> Path:
    return path if path.suffix == ".json" and not path.is_dir() else path / FRONT_FILE


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunDirectoryError(_missing(file)) from error
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        _damaged(str(file), str(error))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _damaged(origin: str, reason: str) -> NoReturn:
    raise RunDirectoryError(
        f"{origin} is damaged ({reason}). Next step: restore it, or write it again with "
        "`autocompress search ... --out DIR --resume`, which keeps the trials."
    )


def _missing(file: Path) -> str:
    directory = file.parent
    if directory.is_dir():
        return (
            f"A run directory holds {FRONT_FILE}, but {directory} does not. Next step: give the "
            "--out directory of `autocompress search`, or finish that search with --resume."
        )
    beside = directory.parent
    runs = [p.parent.name for p in beside.glob(f"*/{FRONT_FILE}")] if beside.is_dir() else []
    return f"There is no run directory {directory}. {nearest(directory.name, runs)}"
