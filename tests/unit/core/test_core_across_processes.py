from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autocompress.core import Allocation, Scheme, derived_seed, digest

SCRIPT = """
from autocompress.core import Allocation, Scheme, derived_seed, digest
print(Scheme.parse("svd_llm(rank=96)+gptq(bits=4,group_size=64)").digest)
print(Allocation.from_json({"b": "rtn(bits=4)", "a": "wanda(sparsity=0.5)"}).digest)
print(digest({"x": [1, 2.5, None, True], "a": "text"}))
print(derived_seed("seed", 3))
"""


def answers_of_a_fresh_process(hash_seed: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_digests_and_seeds_are_the_same_in_every_process(hash_seed):
    here = [
        Scheme.parse("svd_llm(rank=96)+gptq(bits=4,group_size=64)").digest,
        Allocation.from_json({"a": "wanda(sparsity=0.5)", "b": "rtn(bits=4)"}).digest,
        digest({"a": "text", "x": [1, 2.5, None, True]}),
        str(derived_seed("seed", 3)),
    ]
    assert answers_of_a_fresh_process(hash_seed) == here


def test_digests_are_those_of_earlier_versions():
    # Names of cached and exported files: a change here orphans them.
    assert digest({"a": 1}) == "2c6b113b8dd15ffbded9860b43eb0c6c"
    assert Scheme.parse("rtn(bits=4)").digest == digest("rtn(bits=4)")


@pytest.mark.parametrize(
    "module", ["autocompress.core", "autocompress.fronts", "autocompress.objectives"]
)
def test_the_lower_layers_start_without_heavy_libraries(module):
    heavy = "torch transformers ray optuna datasets sklearn pandas numpy moocore jsonschema rich"
    code = f"import sys, {module}; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
