"""Every shipped space on every supported architecture, and the lightness of listing them."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

from autocompress.models.layout import ModelLayout, describe
from autocompress.spaces import available_spaces, load_space
from autocompress.testing.tiny_models import FAMILIES, tiny_model


@cache
def _layout(family: str) -> ModelLayout:
    return describe(tiny_model(family))


@pytest.mark.parametrize("name", sorted(available_spaces()))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shipped_space_searches_every_layer_of_every_architecture(family, name):
    layout = _layout(family)
    space = load_space(name, layout.layers)
    assert sorted(space.searched_layers) == sorted(layer.name for layer in layout.layers)
    assert space.n_combinations > 1000
    in_blocks = [c for c in space.choices if layout.layer(c.layers[0]).block is not None]
    assert all(len(choice.options) >= 2 for choice in in_blocks)
    summary = space.summary()
    assert summary["smallest_bytes"] < summary["base_bytes"]


@pytest.mark.parametrize("name", sorted(available_spaces()))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_baselines_of_a_shipped_space_are_members_of_it(family, name):
    space = load_space(name, _layout(family).layers)
    baselines = space.baselines()
    assert len(baselines) >= 3
    assert len({allocation.digest for _, allocation in baselines}) == len(baselines)
    assert all(space.decode(space.encode(a)) == a for _, a in baselines)


def test_a_key_value_group_and_its_query_are_tied_on_a_real_architecture():
    space = load_space("quick", _layout("llama").layers)
    tied = [choice for choice in space.choices if len(choice.layers) > 1]
    assert {len(choice.layers) for choice in tied} == {2, 3}
    assert {len(option.schemes) for choice in tied for option in choice.options} == {2, 3}


def test_listing_spaces_loads_no_heavy_library():
    code = (
        "import sys; from autocompress.spaces import available_spaces; available_spaces();"
        "sys.exit(bool({'torch', 'transformers', 'ray', 'optuna'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
