"""First proposals of adaptive samplers: near the baselines instead of anywhere."""

from __future__ import annotations

import random
from itertools import pairwise

from autocompress.core import derived_seed
from autocompress.spaces import SearchSpace

_SHARES = (0.1, 0.9)
_N_MUTATIONS = 1.0


def crossed_baselines(space: SearchSpace, seed: int) -> dict[str, int]:
    """Levels of a cross between two neighbouring uniform allocations, slightly mutated.

    Uniform draws over per-layer options meet, by the law of large numbers, at one size, and in a
    space of many methods almost every layer of theirs is a poor option. A cross of neighbours (4
    bits here, 3 bits there) lies between two good points; one choice in expectation is redrawn
    from all of its options.

    Args:
        space: its uniform baselines, mildest first.
        seed: of this proposal alone.

    Returns:
        Level by choice; empty if the space has fewer than two baselines.
    """
    levels = [space.encode(allocation) for _, allocation in space.baselines()]
    pairs = list(pairwise(levels))
    if not pairs:
        return {}
    generator = random.Random(derived_seed("crossed baselines", seed))
    mild, harsh = generator.choice(pairs)
    share = generator.uniform(*_SHARES)
    crossed = {name: (harsh if generator.random() < share else mild)[name] for name in mild}
    chance = _N_MUTATIONS / len(space.choices)
    for choice in space.choices:
        if generator.random() < chance:
            crossed[choice.name] = generator.randrange(len(choice.options))
    return crossed
