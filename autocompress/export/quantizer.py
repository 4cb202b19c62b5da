"""The packed format as a quantizer of transformers.

Imported by `autocompress.export.hook` while transformers itself may still be loading: only the
registry, its base classes and torch-free modules are imported here, the rest when a model loads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from autocompress.export.plan import QUANT_METHOD, PackedPlan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class AutocompressConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """The `quantization_config` of a packed checkpoint: scheme and shape of every layer."""

    quant_method = QUANT_METHOD

    def __init__(self, plan: PackedPlan) -> None:
        self.plan = plan

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> AutocompressConfig | tuple[AutocompressConfig, dict[str, Any]]:
        """Read config.json's object.

        Raises:
            CheckpointError: it is malformed, or of a newer format version.
        """
        config = cls(PackedPlan.from_json(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The object that goes into config.json."""
        return self.plan.to_json()


@register_quantizer(QUANT_METHOD)
class AutocompressQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Swaps packed modules into the empty model before its weights are read."""

    requires_calibration = True

    def __init__(self, quantization_config: AutocompressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: tuple[Path, ...] = ()

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        import torch

        from autocompress.export.integrity import require_stored_tensors
        from autocompress.export.swapping import swap_modules

        _ = kwargs
        plan = self.quantization_config.plan
        self._files = tuple(Path(file) for file in checkpoint_files or ())
        if self._files:
            require_stored_tensors(plan, self._files)
        compute = torch.get_default_dtype() if dtype is None else dtype
        self.quantization_config.plan = swap_modules(model, plan, compute)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        from autocompress.export.modules import restore_stored_dtypes, use_kernels
        from autocompress.export.swapping import require_sound

        _ = kwargs
        restore_stored_dtypes(model)
        require_sound(model, self._files)
        use_kernels(model, os.environ.get("AUTOCOMPRESS_KERNELS") or "reference")
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights are constants."""
        return False
