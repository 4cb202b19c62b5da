"""Dense checkpoints: decoded weights that any tool loads.

Compression is simulated, at full size; only what nothing is left of is really gone: blocks, and
neurons and heads that all blocks can spare.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from autocompress.core import Allocation
from autocompress.core.errors import UsageError
from autocompress.export.directory import new_directory
from autocompress.export.manifest import Manifest
from autocompress.export.narrower import narrow
from autocompress.export.shorter import shortened
from autocompress.export.writing import finish, require_bytes, shallow_copy
from autocompress.methods import rounds_inputs
from autocompress.models import BaseModel, overridden
from autocompress.models.experts import stack_experts
from autocompress.models.quiet import quiet_transformers


def write_dense(
    base: BaseModel,
    weights: Mapping[str, Tensor],
    allocation: Allocation,
    out: Path,
    *,
    claim: Mapping[str, Any],
) -> Manifest:
    """Write a plain transformers checkpoint that stock tools load without this package.

    It computes what the compressed model computes and weighs what the base model weighs, less the
    blocks of which nothing is left and the neurons and heads that all blocks can spare; the
    manifest says ``simulated`` and gives the dense bytes.

    Args:
        base: model that was compressed; it is not changed.
        weights: decoded (out_features, in_features) matrices by layer name, in the base dtype.
        allocation: the schemes that `weights` were made by, for the manifest.
        out: new or empty directory; appears complete or not at all.
        claim: what was measured, for the manifest. Its ``storage_bytes`` are those of the packed
            form, not of this file.

    Returns:
        The manifest that was written.

    Raises:
        RunDirectoryError: `out` is not empty or cannot be written.
        ModelError: a name, shape or dtype does not fit, or the base model cannot be exported.
        UsageError: a scheme rounds the layer's inputs, which plain weights cannot say.
    """
    rounding = next((name for name, scheme in allocation.items() if rounds_inputs(scheme)), None)
    if rounding is not None:
        raise UsageError(
            f"A dense checkpoint holds weights alone, but layer {rounding} rounds its inputs "
            f"({allocation[rounding]}). Next step: export --format packed, or pick another member."
        )
    model = shallow_copy(base.module)
    with new_directory(out) as directory:
        with quiet_transformers(), overridden(model, base.layout, weights):
            cut = narrow(model, base.layout)
            with shortened(model, base.layout, allocation, base.auto_class) as gone:
                stack_experts(model)
                model.save_pretrained(directory)
        manifest = finish(
            directory,
            base,
            allocation=allocation,
            claim=claim,
            checkpoint_format="dense",
            notes={},
        )
        whole = "the base model, without what is gone, weighs"
        require_bytes(manifest.storage_bytes, base.layout.base_bytes - cut - gone, whole)
    return manifest
