"""First proposals lie between neighbouring baselines."""

from __future__ import annotations

import itertools

from autocompress.models import describe
from autocompress.search.opening import crossed_baselines
from autocompress.spaces import load_space
from autocompress.testing.tiny_models import tiny_model


def _space(name):
    return load_space(name, describe(tiny_model("llama")).layers)


def test_an_opening_depends_on_its_seed_alone():
    space = _space("joint")
    assert crossed_baselines(space, 7) == crossed_baselines(space, 7)
    assert len({tuple(crossed_baselines(space, seed).items()) for seed in range(20)}) > 15


def test_most_choices_of_an_opening_are_those_of_two_neighbouring_baselines():
    space = _space("joint")
    levels = [space.encode(allocation) for _, allocation in space.baselines()]
    for seed in range(50):
        opening = crossed_baselines(space, seed)
        assert space.decode(opening) in space
        strangers = min(
            sum(opening[c] not in (mild[c], harsh[c]) for c in opening)
            for mild, harsh in itertools.pairwise(levels)
        )
        assert strangers <= len(space.choices) // 2


def test_openings_spread_over_the_sizes_between_the_extreme_baselines():
    space = _space("mixed_precision")
    bits = [
        sum(o.storage_bytes for c in space.choices for o in [c.options[opening[c.name]]])
        for opening in (crossed_baselines(space, seed) for seed in range(60))
    ]
    uniform = [
        sum(c.options[space.encode(a)[c.name]].storage_bytes for c in space.choices)
        for _, a in space.baselines()
    ]
    assert min(bits) < sorted(uniform)[1]
    assert max(bits) > sorted(uniform)[-2]
