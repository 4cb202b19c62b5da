"""Pareto fronts: non-domination, hypervolume, knee, and the published `front.json`."""

from autocompress.fronts.document import (
    FRONT_FILE,
    BaseEntry,
    BudgetSpent,
    FrontDocument,
    Member,
    MemberQuality,
    ReferencePoint,
    StudySummary,
    find_member,
    parse_bytes,
    pick,
    relative_hypervolume,
)
from autocompress.fronts.front import Front
from autocompress.fronts.geometry import hypervolume, knee_index, non_dominated, reference_point

__all__ = [
    "FRONT_FILE",
    "BaseEntry",
    "BudgetSpent",
    "Front",
    "FrontDocument",
    "Member",
    "MemberQuality",
    "ReferencePoint",
    "StudySummary",
    "find_member",
    "hypervolume",
    "knee_index",
    "non_dominated",
    "parse_bytes",
    "pick",
    "reference_point",
    "relative_hypervolume",
]
