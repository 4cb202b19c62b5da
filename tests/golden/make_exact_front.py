"""Measure every allocation of the tiny model anew: about a minute.

python tests/golden/make_exact_front.py tests/golden/exact_front.npz
"""

import sys
from pathlib import Path

from autocompress.testing.exhaustive import ExactFront, exact_space

if __name__ == "__main__":
    exact = exact_space()
    ExactFront.of(exact.space, exact.damages(exact.all_levels)).save(Path(sys.argv[1]))
