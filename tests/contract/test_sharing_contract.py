"""Every method that layers share, put through its contract kit. A new one adds one row here."""

import pytest

from autocompress.methods import METHODS, Sharing
from autocompress.testing.method_contract import MethodExamples
from autocompress.testing.sharing_contract import SHARING_CONTRACT

EXAMPLES = {
    "basis_sharing": MethodExamples(
        schemes=(
            "basis_sharing(blocks=0/1/2,rank=9)",
            "basis_sharing(blocks=0/1/2,rank=17)+gptq(bits=4,group_size=16,symmetric=false)",
            "basis_sharing(blocks=0/1/2,rank=8)+wanda(sparsity=0.5)+rtn+eora(rank=2)",
        ),
        ladder=tuple(f"basis_sharing(blocks=0/1/2,rank={rank})" for rank in (1, 4, 9, 17, 24)),
        bad_options={
            "rank": "basis_sharing(blocks=0/1/2,rank=0)",
            "blocks": "basis_sharing(blocks=1/0)",
        },
    ),
    "merged": MethodExamples(
        schemes=(
            "merged(experts=0/1/2)",
            "merged(experts=0/1/2,to=busiest)+gptq(bits=4,group_size=16)+eora(rank=3,bits=8)",
            "merged(experts=0/1/2)+svd_llm(rank=9)+rtn+eora(rank=2)+int_inputs",
        ),
        ladder=tuple(
            f"merged(experts=0/1/2)+rtn(bits=6)+eora(rank={r})" for r in (1, 4, 9, 17, 30)
        ),
        bad_options={"to": "merged(experts=0/1,to=last)", "experts": "merged(experts=4/1)"},
    ),
    "tied": MethodExamples(
        schemes=(
            "tied(blocks=0/1/2)",
            "tied(blocks=0/1/2,to=first)+gptq(bits=4,group_size=16)+eora(rank=3,bits=8)",
            "tied(blocks=0/1/2)+wanda(sparsity=0.5)+rtn(symmetric=false)+lq_lora(rank=2)",
            "tied(blocks=0/1/2)+svd_llm(rank=9)+rtn+eora(rank=2)+int_inputs",
        ),
        ladder=tuple(f"tied(blocks=0/1/2)+rtn(bits=6)+eora(rank={r})" for r in (1, 4, 9, 17, 30)),
        bad_options={"to": "tied(blocks=0/1,to=last)", "blocks": "tied(blocks=4)"},
    ),
}
SHARED = [name for name in METHODS if isinstance(METHODS[name], Sharing)]


def test_every_method_that_layers_share_is_covered():
    assert set(EXAMPLES) == set(SHARED)


@pytest.mark.parametrize("check", SHARING_CONTRACT.values(), ids=SHARING_CONTRACT)
@pytest.mark.parametrize("method", SHARED)
def test_sharing_contract(method, check):
    check(EXAMPLES[method])


@pytest.mark.parametrize("method", SHARED)
def test_every_shared_method_has_a_one_line_summary(method):
    assert METHODS[method].summary
    assert "\n" not in METHODS[method].summary
