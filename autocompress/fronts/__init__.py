"""Pareto fronts: non-domination, hypervolume, knee, and the published `front.json`."""

from autocompress.fronts.comparison import (
    Comparison,
    against_baselines,
    comparison_summary,
)
from autocompress.fronts.difference import (
    Difference,
    Verdict,
    paired,
    paired_difference,
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
    "paired_difference",
    "parse_bytes",
    "pick",
    "reference_point",
    "relative_hypervolume",
    "unpaired",
]
