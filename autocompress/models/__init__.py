"""All that knows Hugging Face transformers: loading, layers, weights, calibration statistics."""

from autocompress.models.curvature import (
    CurvatureStore,
    LayerCurvature,
    predicted_damage,
    predicted_damages,
)
from autocompress.models.curvature_pass import collect_curvature, holds_curvature
from autocompress.models.layout import ModelLayout, describe
from autocompress.models.loading import (
    AUTO_CLASSES,
    BaseModel,
    load_base_model,
    load_config,
    load_processor,
    model_digest,
)
from autocompress.models.statistics import StatisticsStore, collect_statistics
from autocompress.models.weights import (
    ResidentWeightsError,
    assert_untouched,
    overridden,
    version_counters,
    weight_matrix,
)

__all__ = [
    "AUTO_CLASSES",
    "BaseModel",
    "CurvatureStore",
    "LayerCurvature",
    "ModelLayout",
    "ResidentWeightsError",
    "StatisticsStore",
    "assert_untouched",
    "collect_curvature",
    "collect_statistics",
    "describe",
    "holds_curvature",
    "load_base_model",
    "load_config",
    "load_processor",
    "model_digest",
    "overridden",
    "predicted_damage",
    "predicted_damages",
    "version_counters",
    "weight_matrix",
]
