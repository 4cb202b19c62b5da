"""A tensor that is decoded when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only


class DeferredWeight(Tensor):
    """Stands for a packed weight: knows shape, dtype and device, decodes when it is computed with.

    Model code asks weights for their dtype or device on every forward; that must cost nothing.
    """

    _decode: Callable[[], Tensor]
    # Weights that are read off a file must not be drawn anew: transformers looks for this mark.
    _is_hf_initialized: bool = True

    @staticmethod
    def of(decoded: Callable[[], Tensor], shape: torch.Size, like: Tensor) -> DeferredWeight:
        """A stand-in of `shape`, in the dtype and on the device of `like`."""
        weight = Tensor._make_wrapper_subclass(
            DeferredWeight, shape, dtype=like.dtype, device=like.device
        )
        weight._decode = decoded
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks `func`
        cls,
        func: OpOverload[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run any operator that does not write to it on the decoded matrix."""
        _ = types
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if any(isinstance(value, DeferredWeight) for value in written):
            raise RuntimeError(f"A packed weight is a constant; {func} would write to it.")
        values = tree_map_only(DeferredWeight, lambda w: w._decode(), (args, dict(kwargs or {})))
        return func(*values[0], **values[1])

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # untyped in torch
        """Shape and dtype; decodes nothing."""
        return f"DeferredWeight({tuple(self.shape)}, dtype={self.dtype})"
