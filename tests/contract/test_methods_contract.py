"""Every registered method, put through the contract kit. A new method adds one row here."""

import pytest

from autocompress.methods import METHODS
from autocompress.testing.method_contract import CONTRACT, MethodExamples

EXAMPLES = {
    "rtn": MethodExamples(
        schemes=(
            "rtn",
            "rtn(bits=3,group_size=0)",
            "rtn(bits=5,group_size=32,symmetric=false)",
            "magnitude(sparsity=0.3)+rtn(bits=8)",
            "svd(rank=9)+rtn(bits=6,group_size=16)",
        ),
        ladder=tuple(f"rtn(bits={bits},group_size=32)" for bits in range(2, 9)),
        bad_options={"bits": "rtn(bits=9)", "group_size": "rtn(group_size=-1)"},
    ),
    "gptq": MethodExamples(
        schemes=(
            "gptq",
            "gptq(bits=3,group_size=16,symmetric=false)",
            "gptq(bits=7,group_size=0,actorder=false)",
            "wanda(sparsity=0.6)+gptq(bits=4,symmetric=false)",
            "svd_llm(rank=12)+gptq(bits=4)",
            "svd_llm(rank=17)+magnitude(sparsity=0.7)+gptq(bits=8)",
        ),
        ladder=tuple(f"gptq(bits={bits},group_size=0)" for bits in range(2, 9)),
        bad_options={
            "bits": "gptq(bits=1)",
            "group_size": "gptq(group_size=-8)",
            "damping": "gptq(damping=0.0)",
        },
    ),
    "magnitude": MethodExamples(
        schemes=("magnitude", "magnitude(sparsity=0.01)", "magnitude(sparsity=0.99)"),
        ladder=tuple(f"magnitude(sparsity=0.{tenths})" for tenths in (9, 7, 5, 3, 1)),
        bad_options={"sparsity": "magnitude(sparsity=1.0)"},
    ),
    "wanda": MethodExamples(
        schemes=("wanda", "wanda(sparsity=0.02)", "svd_llm(rank=10)+wanda(sparsity=0.5)"),
        ladder=tuple(f"wanda(sparsity=0.{tenths})" for tenths in (9, 7, 5, 3, 1)),
        bad_options={"sparsity": "wanda(sparsity=0.0)"},
    ),
    "svd": MethodExamples(
        schemes=("svd(rank=1)", "svd(rank=17)", "svd(rank=8)+wanda(sparsity=0.4)+rtn"),
        ladder=tuple(f"svd(rank={rank})" for rank in (1, 4, 9, 17)),
        bad_options={"rank": "svd(rank=0)"},
    ),
    "svd_llm": MethodExamples(
        schemes=("svd_llm(rank=1)", "svd_llm(rank=17)", "svd_llm(rank=8)+rtn(symmetric=false)"),
        ladder=tuple(f"svd_llm(rank={rank})" for rank in (1, 4, 9, 17)),
        bad_options={"rank": "svd_llm(rank=-2)"},
    ),
    "hadamard": MethodExamples(
        schemes=(
            "hadamard",
            "hadamard(seed=3)+gptq(bits=3,group_size=16)",
            "hadamard+wanda(sparsity=0.5)+rtn",
            "hadamard+svd_llm(rank=9)+rtn(bits=6)",
        ),
        ladder=tuple(f"hadamard+gptq(bits={bits},group_size=0)" for bits in (2, 3, 4, 8)),
        bad_options={"seed": "hadamard(seed=1.5)"},
    ),
    "eora": MethodExamples(
        schemes=(
            "gptq(bits=3)+eora(rank=4)",
            "eora(rank=36,bits=8)",
            "hadamard+wanda(sparsity=0.5)+rtn+eora(rank=3,bits=4)",
            "svd(rank=9)+rtn(bits=4)+eora(rank=2)",
        ),
        ladder=tuple(f"rtn(bits=3)+eora(rank={rank})" for rank in (1, 4, 9, 17, 30)),
        bad_options={"rank": "eora(rank=0)", "bits": "eora(bits=9)"},
    ),
    "int_inputs": MethodExamples(
        schemes=(
            "int_inputs",
            "rtn(bits=8,group_size=0)+int_inputs",
            "hadamard+gptq(bits=4)+eora(rank=2)+int_inputs(bits=4)",
        ),
        ladder=("rtn(bits=4)+int_inputs", "rtn(bits=8)+int_inputs", "int_inputs"),
        bad_options={"bits": "int_inputs(bits=16)"},
    ),
}


def test_every_method_is_covered():
    assert set(EXAMPLES) == set(METHODS)


@pytest.mark.parametrize("check", CONTRACT.values(), ids=CONTRACT)
@pytest.mark.parametrize("method", METHODS)
def test_contract(method, check):
    check(EXAMPLES[method])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_one_line_summary(method):
    assert METHODS[method].summary
    assert "\n" not in METHODS[method].summary
