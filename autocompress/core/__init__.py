"""The vocabulary: frozen values that every other package speaks in. Imports no torch."""

from autocompress.core.allocation import BASE_ALLOCATION, Allocation
from autocompress.core.digest import derived_seed, digest, digest_bytes
from autocompress.core.footprint import Footprint, TensorLayout
from autocompress.core.layer import DTYPE_BYTES, ROLES, ExpertOf, LayerSpec
from autocompress.core.metrics import Measurement, Metrics, Quality, Resource, Resources
from autocompress.core.objectives import (
    DAMAGE,
    DEFAULT_OBJECTIVES,
    LATENCY,
    STORAGE,
    Objectives,
    cost_of,
    short_name,
)
from autocompress.core.registry import Registry
from autocompress.core.scheme import BASE_SCHEME, OptionValue, Scheme, Stage
from autocompress.core.trial import Bar, Elapsed, TrialRequest, TrialResult, TrialStatus

__all__ = [
    "BASE_ALLOCATION",
    "BASE_SCHEME",
    "DAMAGE",
    "DEFAULT_OBJECTIVES",
    "DTYPE_BYTES",
    "LATENCY",
    "ROLES",
    "STORAGE",
    "Allocation",
    "Bar",
    "Elapsed",
    "ExpertOf",
    "Footprint",
    "LayerSpec",
    "Measurement",
    "Metrics",
    "Objectives",
    "OptionValue",
    "Quality",
    "Registry",
    "Resource",
    "Resources",
    "Scheme",
    "Stage",
    "TensorLayout",
    "TrialRequest",
    "TrialResult",
    "TrialStatus",
    "cost_of",
    "derived_seed",
    "digest",
    "digest_bytes",
    "short_name",
]
