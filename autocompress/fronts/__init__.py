"""Pareto fronts: non-domination, hypervolume, knee, and the published `front.json`."""

from autocompress.fronts.comparison import (
    Comparison,
    Difference,
    Verdict,
    against_baselines,
    comparison_summary,
    paired,
    unpaired,
)
from autocompress.fronts.document import (
    FRONT_FILE,
    BaseEntry,
    BudgetSpent,
    Finalized,
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
from autocompress.fronts.geometry import (
    contributions,
    hypervolume,
    knee_index,
    non_dominated,
    reference_point,
)

__all__ = [
    "FRONT_FILE",
    "BaseEntry",
    "BudgetSpent",
    "Comparison",
    "Difference",
    "Finalized",
    "Front",
    "FrontDocument",
    "Member",
    "MemberQuality",
    "ReferencePoint",
    "StudySummary",
    "Verdict",
    "against_baselines",
    "comparison_summary",
    "contributions",
    "find_member",
    "hypervolume",
    "knee_index",
    "non_dominated",
    "paired",
    "parse_bytes",
    "pick",
    "reference_point",
    "relative_hypervolume",
    "unpaired",
]
