"""The cost of a real layout is that of its checkpoint."""

from __future__ import annotations

import pytest

from autocompress.core import BASE_ALLOCATION
from autocompress.cost import DEFAULT_PROFILE, PROFILES, CostModel
from autocompress.models.layout import describe
from autocompress.spaces import load_space
from autocompress.testing.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bart", "vit"])
def test_base_bytes_are_those_of_the_checkpoint_and_narrower_baselines_are_smaller(family):
    layout = describe(tiny_model(family))
    space = load_space("mixed_precision", layout.layers)
    model = CostModel(
        layout.layers, layout.other_bytes, layout.other_macs_per_token,
        PROFILES[DEFAULT_PROFILE], searched_layers=space.searched_layers,
    )  # fmt: skip
    base = model.resources(BASE_ALLOCATION)["storage_bytes"].value
    assert base == layout.base_bytes
    widths = [model.bits_per_weight(allocation) for _, allocation in space.baselines()]
    assert widths == sorted(widths, reverse=True)
    sizes = [model.resources(a)["storage_bytes"].value for _, a in space.baselines()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < base
