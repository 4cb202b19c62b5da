"""Laws of search spaces, on random spaces."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import Allocation, Scheme, Stage
from autocompress.core.errors import SpaceError
from autocompress.spaces import Choice, Option, SearchSpace
from autocompress.spaces.space import power_of_ten

_STAGES = st.builds(
    Stage.of,
    st.sampled_from(["rtn", "gptq", "wanda", "svd"]),
    st.dictionaries(
        st.sampled_from(["bits", "group_size", "sparsity", "rank"]),
        st.one_of(st.integers(0, 8), st.floats(0, 1, allow_nan=False), st.booleans()),
        max_size=2,
    ),
)
_SCHEMES = st.builds(Scheme, st.lists(_STAGES, max_size=2).map(tuple))


@st.composite
def spaces(draw: st.DrawFn, max_choices: int = 4) -> SearchSpace:
    """Choices over one to three layers with distinct options."""
    choices = []
    for index in range(draw(st.integers(1, max_choices))):
        n_layers = draw(st.integers(1, 3))
        per_layer = st.tuples(*[_SCHEMES] * n_layers)
        schemes = draw(st.lists(per_layer, min_size=1, max_size=4, unique_by=_texts))
        options = tuple(
            Option(" / ".join(map(str, s)), s, draw(st.integers(0, 1000))) for s in schemes
        )
        layers = tuple(f"block.{index}.{layer}" for layer in range(n_layers))
        options = tuple(sorted(options, key=lambda option: option.storage_bytes))
        choices.append(Choice(f"block.{index}", layers, options, 1000))
    return SearchSpace("random", "For laws.", tuple(choices))


def _texts(schemes: tuple[Scheme, ...]) -> tuple[str, ...]:
    """What two schemes must differ in: `rtn(bits=1)` and `rtn(bits=True)` are equal in Python."""
    return tuple(str(scheme).replace("true", "1").replace("false", "0") for scheme in schemes)


@given(spaces(), st.data())
@settings(deadline=None)
def test_decode_and_encode_are_inverse(space, data):
    levels = {
        c.name: data.draw(st.integers(0, len(c.options) - 1), label=c.name) for c in space.choices
    }
    allocation = space.decode(levels)
    assert space.decode(space.encode(allocation)) == allocation
    assert space.encode(allocation) == levels
    assert allocation in space


@given(spaces(max_choices=3))
@settings(max_examples=30, deadline=None)
def test_the_number_of_combinations_counts_the_distinct_allocations(space):
    names = [choice.name for choice in space.choices]
    levels = product(*(range(len(choice.options)) for choice in space.choices))
    allocations = {space.decode(dict(zip(names, values, strict=True))) for values in levels}
    assert len(allocations) == space.n_combinations
    assert space.n_combinations == math.prod(len(choice.options) for choice in space.choices)


@given(spaces(), _SCHEMES)
@settings(deadline=None)
def test_an_allocation_is_in_the_space_exactly_if_every_choice_offers_it(space, scheme):
    allocation = Allocation.of(dict.fromkeys(space.searched_layers, scheme))
    offered = all(
        any(all(s == scheme for s in option.schemes) for option in choice.options)
        for choice in space.choices
    )
    assert (allocation in space) == offered
    if not offered:
        with pytest.raises(SpaceError, match="does not offer"):
            space.encode(allocation)


@given(spaces())
@settings(deadline=None)
def test_a_space_survives_json(space):
    again = SearchSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    assert again.digest == space.digest


@given(spaces())
@settings(deadline=None)
def test_baselines_are_distinct_members_and_never_the_base(space):
    baselines = space.baselines()
    assert all(allocation in space and len(allocation) for _, allocation in baselines)
    assert len({allocation for _, allocation in baselines}) == len(baselines)
    assert len({name for name, _ in baselines}) == len(baselines)


@given(spaces(max_choices=2), spaces(max_choices=2))
@settings(deadline=None)
def test_the_digest_tells_different_choices_apart_and_nothing_else(one, other):
    renamed = SearchSpace("other name", "Other words.", one.choices)
    assert renamed.digest == one.digest
    assert (one.digest == other.digest) == (_offers(one) == _offers(other))


def _offers(space: SearchSpace) -> list[list[list[str]]]:
    return [[[str(s) for s in o.schemes] for o in c.options] for c in space.choices]


@given(st.integers(1, 10**400))
@settings(deadline=None)
def test_a_power_of_ten_is_right_to_its_digit_however_large_the_count(count):
    text = power_of_ten(count)
    if text.startswith("10^"):
        # 10^(e - 0.05) <= count <= 10^(e + 0.05), in integers: both sides to the 20th power. The
        # factor 2 there is 0.015 of e: rounding of the logarithm just at a boundary.
        tenths = round(10 * float(text[3:]))
        assert 10 ** (2 * tenths - 1) <= 2 * count**20
        assert count**20 <= 2 * 10 ** (2 * tenths + 1)
    else:
        assert int(text) == count < 100_000


def test_the_digest_is_the_same_in_every_process():
    space = SearchSpace(
        "s", "d",
        (Choice("c", ("a", "b"), (Option("x", (Scheme.parse("rtn(bits=4)"), Scheme())),)),),
    )  # fmt: skip
    code = (
        "from autocompress.spaces import Choice, Option, SearchSpace;"
        "from autocompress.core import Scheme;"
        "o = Option('x', (Scheme.parse('rtn(bits=4)'), Scheme()));"
        "print(SearchSpace('s', 'd', (Choice('c', ('a', 'b'), (o,)),)).digest)"
    )
    for seed in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert run.stdout.strip() == space.digest
