"""Trellis codes against GPTQ's levels, on whole models: uniform at each width, plainly and rotated.

Every layer that the space names has the same option. The damage of the task on search tokens, and
bits per weight with everything that is stored.

Usage: python benchmarks/trellis_codes.py [--model M] [--cache DIR] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Iterator

from embedding import measure

from autocompress.core import Allocation
from autocompress.spaces import SearchSpace


def uniform(space: SearchSpace) -> Iterator[tuple[str, Allocation]]:
    """Each option that every choice has, for all of them."""
    names = [{option.label: i for i, option in enumerate(c.options)} for c in space.choices]
    for label in names[0]:
        if label != "base" and all(label in levels for levels in names):
            chosen = zip(space.choices, names, strict=True)
            yield label, space.decode({choice.name: levels[label] for choice, levels in chosen})


if __name__ == "__main__":
    measure(__doc__, "trellis_bits", uniform, "results/trellis_codes_minilm.json")
