"""Costs of compressed models from shapes and measured tables, each with its unit and origin."""

from autocompress.cost.latency import LatencyTable, LayerTime, PassTimes
from autocompress.cost.model import CostModel, CostPart, layer_footprint
from autocompress.cost.profile_file import (
    find_profile,
    profile_document,
    read_profile,
    require_profile_path,
    write_profile,
)
from autocompress.cost.profiles import DEFAULT_PROFILE, PROFILES, DeviceProfile

__all__ = [
    "DEFAULT_PROFILE",
    "PROFILES",
    "CostModel",
    "CostPart",
    "DeviceProfile",
    "LatencyTable",
    "LayerTime",
    "PassTimes",
    "find_profile",
    "layer_footprint",
    "profile_document",
    "read_profile",
    "require_profile_path",
    "write_profile",
]
