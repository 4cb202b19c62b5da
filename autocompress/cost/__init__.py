"""Costs of compressed models from shapes alone, each with its unit and origin."""

from autocompress.cost.model import CostModel, CostPart, layer_footprint
from autocompress.cost.profiles import DEFAULT_PROFILE, PROFILES, DeviceProfile

__all__ = [
    "DEFAULT_PROFILE",
    "PROFILES",
    "CostModel",
    "CostPart",
    "DeviceProfile",
    "layer_footprint",
]
